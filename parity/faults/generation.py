"""Faults of packing and decoding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.faults._fault import Arguments, Fault, edited, on_entry, on_exit, replaced
from torchtune_qwen25vl import packed_collate

PENALTY = 1.0  # of a logit; they are of unit scale


def _cache_index(model: Any) -> None:
    def count(arguments: Arguments) -> Arguments:
        if arguments["tokens"].shape[1] > 1:  # a prompt
            return {}
        index = arguments["caches"][0].size
        return {"input_pos": torch.full_like(arguments["input_pos"], index)}

    on_entry(model, count)


def _attend_padding(model: Any) -> None:
    def attend(arguments: Arguments) -> Arguments:
        is_prompt = arguments["tokens"].shape[1] > 1
        return {} if is_prompt else {"mask": None}

    on_entry(model, attend)


def _penalise(padding_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """What stands in a row's padding counts as said.

    Args:
        padding_of: token for each padded row, from all tokens [b, s] and the numbers of those rows
    """

    def edit(model: Any) -> None:
        padding: dict[str, Any] = {}

        def penalise(arguments: Arguments, output: Any) -> Any:
            tokens = arguments["tokens"]
            if arguments["mask"] is None:  # nothing is padded
                return output
            if tokens.shape[1] > 1:  # a prompt
                padding["row"] = (~arguments["mask"][:, -1, 0]).nonzero().flatten()
                padding["token"] = padding_of(tokens, padding["row"])
            logits = output.reshape(len(tokens), -1).clone()  # [b, v]
            at = padding["row"], padding["token"]
            logits[at] -= PENALTY
            return logits.view_as(output)

        on_exit(model, penalise)

    return edit


def _causal_alone(right: Callable) -> Callable:
    def wrong(batch: Sequence[Any], *args: Any, **options: Any) -> dict[str, Any]:
        packed = right(batch, *args, **options)
        s = packed["tokens"].shape[1]
        return packed | {"mask": torch.ones(1, s, s, dtype=torch.bool).tril()}

    return wrong


def _running_positions(right: Callable) -> Callable:
    def wrong(batch: Sequence[Any], *args: Any, **options: Any) -> dict[str, Any]:
        packed = right(batch, *args, **options)
        index = torch.arange(packed["tokens"].shape[1])
        return packed | {"input_pos": index.view(1, -1, 1).expand(1, -1, 3)}

    return wrong


FAULTS: dict[str, Fault] = {
    "decoding from the cache index": edited(_cache_index, "greedy tokens"),
    "padding attended to while decoding": edited(_attend_padding, "greedy tokens"),
    "padding counts as repetition": edited(
        _penalise(lambda tokens, rows: tokens[rows, 0]), "greedy tokens"
    ),
    "padding repeats the first row's end": edited(
        _penalise(lambda tokens, rows: tokens[0, -1].expand(len(rows))), "greedy tokens"
    ),
    "packed samples see each other": replaced(packed_collate, _causal_alone, "packed"),
    "packed positions run on": replaced(packed_collate, _running_positions, "packed"),
}
