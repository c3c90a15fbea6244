"""Recorded hidden states: every site at every layer, over every span, against hooks on theirs.

Shapes: b rows, s tokens, p patches, n vectors of a span in one row.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from parity import reference
from parity.inputs import LAYOUTS, Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage, max_error
from torchtune_qwen25vl.hidden_states import hidden_states

# model, layout, and how the rows are padded: left, or right with labels, as to train
CASES = (
    ("tiny", "image", "left"),
    ("tiny", "two images", "left"),
    ("tiny", "mixed batch", "left"),
    ("tiny", "mixed batch", "right"),
    ("tiny", "image and video", "left"),
    ("tied", "video", "right"),
    ("tiny", "text", "left"),
    ("deep", "two images", "left"),
)
TEXT: list[list[int | tuple]] = [[12], [7]]  # of tokens, without media
DECODER_SPANS = (
    *("image_first", "image_last", "image_mean", "image_all"),
    *("query_last", "query_mean", "last", "all"),
)
VISION_SPANS = ("mean", "all")


def measure_hidden_states(setting: Setting) -> Iterator[Measurement]:
    """All spans of each site, row by row."""
    for name, layout, side in _cases(setting):
        theirs = reference.model(name, setting.device)
        inputs = _inputs(name, layout, side).to(setting.device)
        batch = inputs.ours | ({"labels": inputs.labels} if side == "right" else {})
        right = reference.site_outputs(theirs, inputs)
        wanted = [f"{site}/{span}" for site in right for span in _spans_of(site)]
        ours = hidden_states(setting.ours_like(theirs), batch, wanted)
        for site, states in right.items():
            error = max(
                _error(ours[f"{site}/{span}"], expected)
                for span, expected in _expected(site, states, inputs.to("cpu"), side).items()
            )
            tolerance = 1e-5 * max(1.0, float(states.abs().max()))
            yield Measurement(f"{name}: {layout}, {site}", error, tolerance)


def _cases(setting: Setting) -> list[tuple[str, str, str]]:
    if setting.checkpoint:
        return [(setting.checkpoint, layout, side) for _, layout, side in CASES[:-1]]
    return [case for case in CASES if case[0] != "deep" or not setting.small]


def _inputs(name: str, layout: str, side: str) -> Inputs:
    ids = reference.ids(reference.model(name))
    inputs = make_inputs(TEXT if layout == "text" else LAYOUTS[layout], ids)
    return inputs.padded_left() if side == "left" else inputs


def _spans_of(site: str) -> tuple[str, ...]:
    return VISION_SPANS if site.split(".")[0] in ("vision", "merger") else DECODER_SPANS


def _expected(site: str, states: Tensor, inputs: Inputs, side: str) -> dict[str, list[Tensor]]:
    """What each span holds, one tensor [n, width] or [width] for each row."""
    if site.split(".")[0] in ("vision", "merger"):
        rows = _patches_of_rows(states, inputs, is_unit=site == "merger")
        return {"all": rows, "mean": [_mean(row) for row in rows]}
    spans = [_columns(inputs, row, side) for row in range(len(inputs.tokens))]
    return {
        span: [_of(span, states[row, spans[row][span]]) for row in range(len(spans))]
        for span in DECODER_SPANS
    }


def _of(span: str, vectors: Tensor) -> Tensor:
    return vectors if span.endswith("all") else _mean(vectors)


def _mean(vectors: Tensor) -> Tensor:
    return vectors.double().mean(0)  # of none: nan


def _columns(inputs: Inputs, row: int, side: str) -> Mapping[str, list[int]]:
    """Which columns each span of a row holds, by the mask and the labels that theirs reads."""
    real = inputs.attention_mask[row].nonzero().flatten().tolist()
    images = [c for c in real if inputs.is_placeholder[row, c]]
    prompt = real
    if side == "right":
        # nothing predicts a first token, so its label is not read
        labelled = [c for c in real[1:] if inputs.labels[row, c] != CROSS_ENTROPY_IGNORE_IDX]
        prompt = [c for c in real if c < labelled[0]]
    return {
        "image_first": images[:1],
        "image_last": images[-1:],
        "image_mean": images,
        "image_all": images,
        "query_last": prompt[-1:],
        "query_mean": [c for c in prompt if not images or c > images[-1]],
        "last": real[-1:],
        "all": real,
    }


def _patches_of_rows(states: Tensor, inputs: Inputs, *, is_unit: bool) -> list[Tensor]:
    """States of patches or units in reading order, of each row."""
    counts = inputs.is_placeholder.sum(-1) * (1 if is_unit else 4)
    return list(states.split(counts.tolist()))


def _error(ours: Any, theirs: list[Tensor]) -> float:
    """Largest difference over rows; where one is nan, both must be."""
    if len(ours) != len(theirs):
        return float("inf")
    errors = []
    for mine, their in zip(ours, theirs, strict=True):
        absent = their.isnan()
        is_same = mine.shape == their.shape and torch.equal(mine.cpu().isnan(), absent)
        errors.append(max_error(mine.cpu()[~absent], their[~absent]) if is_same else float("inf"))
    return max(errors)


HIDDEN_STATES = Stage(
    name="hidden states",
    what="recorded states: every site at every layer, over every span, against hooks",
    tolerance="1e-5 * max(1, absmax) of what is recorded from, as for the layers",
    fault="layers counted from the embedding",
    measure=measure_hidden_states,
)
