"""Pairs of answers for the stage of preference, in our form and in theirs.

Shapes: n pairs, s tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from parity.inputs import TEXT_IDS, Inputs, make_inputs

# of a prompt: parts, tokens of the chosen and of the rejected answer, whether other images are
# shown to the rejected one
Layout = tuple[list[int | tuple], int, int, bool]
TEXT: list[Layout] = [
    ([7], 5, 3, False),
    ([4], 2, 6, False),
    ([9], 4, 4, False),
    ([3], 7, 1, False),
]
IMAGES: list[Layout] = [
    ([5, (1, 4, 6), 4], 3, 6, False),
    ([2, (1, 6, 8), 3, (1, 8, 4), 2], 6, 4, False),
    ([6], 4, 5, False),
    ([3, (1, 8, 4), 5], 5, 2, True),
]


class Pair(NamedTuple):
    """A chosen and a rejected answer, each with its prompt."""

    chosen: Inputs
    rejected: Inputs


def make_pairs(layouts: Sequence[Layout], ids: Mapping[str, int], *, seed: int) -> list[Pair]:
    """Make a pair of each layout, with random tokens and patches."""
    pairs = []
    for number, (parts, chosen, rejected, other_images) in enumerate(layouts):
        one, two = (
            make_inputs([[*parts, answer]], ids, seed=100 * seed + number)
            for answer in (chosen, rejected)
        )
        two.tokens[:, -rejected:] = (two.tokens[:, -rejected:] + 17) % TEXT_IDS
        two.labels[:, -rejected:] = two.tokens[:, -rejected:]
        if other_images:
            two.pixel_values.neg_()
        pairs.append(Pair(one, two))
    return pairs


def moved(answer: Inputs, prompt: Inputs) -> Inputs:
    """The answer to one prompt behind another, all of it text from there on."""
    length, start = (int((row.labels >= 0).sum()) for row in (answer, prompt))
    kept = prompt.tokens.shape[1] - start
    tail = prompt.positions[:, kept - 1 : kept] + torch.arange(1, length + 1)[None, :, None]
    fields = {
        "tokens": torch.cat([prompt.tokens[:, :kept], answer.tokens[:, -length:]], 1),
        "labels": torch.cat([prompt.labels[:, :kept], answer.labels[:, -length:]], 1),
        "positions": torch.cat([prompt.positions[:, :kept], tail], 1),
        "attention_mask": torch.ones(1, kept + length, dtype=torch.long),
    }
    return Inputs(**{**vars(prompt), **fields})


def sample(row: Inputs) -> dict[str, Any]:
    """One row as our data sets make it."""
    alone = {"tokens": row.tokens[0], "labels": row.labels[0], "input_pos": row.positions[0]}
    return row.ours | alone


def samples(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The samples of pairs."""
    return [{**sample(pair.chosen), "rejected": sample(pair.rejected)} for pair in pairs]


def their_batch(pairs: Sequence[Pair], ids: Mapping[str, int]) -> dict[str, Tensor]:
    """Pairs as TRL lays them out: the chosen answers first, padded on the right."""
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]

    def padded(values: Sequence[Tensor], fill: int = 0) -> Tensor:
        return pad_sequence(list(values), batch_first=True, padding_value=fill)

    batch = {
        "input_ids": padded([row.tokens[0] for row in rows]),
        "attention_mask": padded([row.attention_mask[0] for row in rows]),
        "completion_mask": padded(
            [(row.labels[0] != CROSS_ENTROPY_IGNORE_IDX).long() for row in rows]
        ),
        "position_ids": padded([row.positions[0] for row in rows]).permute(2, 0, 1),
    }
    batch["mm_token_type_ids"] = (batch["input_ids"] == ids["image_token_id"]).int()
    shown = [row for row in rows if len(row.grid_thw)]
    if shown:
        batch["pixel_values"] = torch.cat([row.pixel_values for row in shown])
        batch["image_grid_thw"] = torch.cat([row.grid_thw for row in shown])
    return batch
