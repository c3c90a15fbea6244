"""Faults of recorded hidden states: the wrong token, layer, site or order."""

from collections.abc import Callable
from typing import Any

import torch

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl.hidden_states import hidden_states

STAGE = "hidden states"
Right = Callable[..., dict[str, Any]]


def _published_boundary(right: Right) -> Right:
    def wrong(model: Any, batch: Any, wanted: Any) -> Any:
        return right(model, batch, wanted, vision_boundary="halp")

    return wrong


def _asked_otherwise(change: Callable[[str, int], str]) -> Callable[[Right], Right]:
    """Record for each selector what another one asks for."""

    def wrap(right: Right) -> Right:
        def wrong(model: Any, batch: Any, wanted: Any) -> Any:
            other = {text: change(text, len(model.layers)) for text in wanted}
            states = right(model, batch, list(other.values()))
            return {text: states[asked] for text, asked in other.items()}

        return wrong

    return wrap


def _one_layer_early(text: str, layers: int) -> str:
    site, _, span = text.partition("/")
    kind, _, number = site.partition(".")
    if kind != "layer":
        return text
    return f"layer.{int(number) - 1}/{span}" if int(number) else f"embed/{span}"


def _last_layer_normed(text: str, layers: int) -> str:
    return text.replace(f"layer.{layers - 1}/", "norm/")


def _merged_vision(text: str, layers: int) -> str:
    return "merger/mean" if text.startswith("vision.") and text.endswith("/mean") else text


def _padding_counted(right: Right) -> Right:
    """Take padding on the right, whose positions are all 0, for text."""

    def wrong(model: Any, batch: Any, wanted: Any) -> Any:
        positions = batch["input_pos"].clone()
        if batch.get("mask") is None:
            positions[:, 1:][(positions[:, 1:] == 0).all(-1)] = 1
        return right(model, {**batch, "input_pos": positions}, wanted)

    return wrong


def _order_of_the_encoder(right: Right) -> Right:
    def wrong(model: Any, batch: Any, wanted: Any) -> Any:
        states = right(model, batch, wanted)
        if not (vision := (batch.get("encoder_input") or {}).get("vision")):
            return states
        order = model.vision.arrange(vision["grid_thw"].tolist()).order
        for text in wanted:
            if text.startswith("vision.") and text.endswith("/all"):
                lengths = [len(row) for row in states[text]]
                units = torch.cat(states[text]).unflatten(0, (len(order), -1))
                states[text] = list(units[order.to(units.device)].flatten(0, 1).split(lengths))
        return states

    return wrong


FAULTS: dict[str, Fault] = {
    "layers counted from the embedding": replaced(
        hidden_states, _asked_otherwise(_one_layer_early), STAGE
    ),
    "last layer recorded behind the norm": replaced(
        hidden_states, _asked_otherwise(_last_layer_normed), STAGE
    ),
    "vision mean behind the merger": replaced(
        hidden_states, _asked_otherwise(_merged_vision), STAGE
    ),
    "last image token of the HALP scripts": replaced(hidden_states, _published_boundary, STAGE),
    "padding counted in a mean": replaced(hidden_states, _padding_counted, STAGE),
    "patches left in the encoder's order": replaced(hidden_states, _order_of_the_encoder, STAGE),
}
