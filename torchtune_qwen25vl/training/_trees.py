r"""Samples of a step to batches of trees: a prompt once, and behind it the answers to it.

A tree is a trunk, the tokens that all answers begin with, and a branch for each answer, which sees
the trunk and itself but no other branch::

    tokens  <image> What is it ? assistant | \n A cat . | \n A dog .
    branch  0       0    0  0  0 0         | 1  1 1   1 | 2  2 2   2

The trunk ends before the token that predicts the first label, for each branch predicts its own.
Positions are those that each answer has alone. Answers that differ earlier, by a turn or an image,
share what stands before.

Shapes: b rows of a batch, s tokens, t trees, m placeholders.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl._torchtune import labelled_rows
from torchtune_qwen25vl.training._batches import Batch, Mask, StepBatches, plan_rows
from torchtune_qwen25vl.training._images import Encoded, Images
from torchtune_qwen25vl.training._masks import FLEX_BLOCK, tree_mask
from torchtune_qwen25vl.training._step import label_rows
from torchtune_qwen25vl.transform import batch_to_device, round_up

Sample = Mapping[str, Any]
Row = dict[str, Tensor]  # of a prompt with an answer, or of a tree: each field [s, ...]
TEXT = -1  # in place of the number of an embedding
PADDING = -1  # in place of the number of a tree


class TreeCollate:
    """Samples of a step to batches of trees: rows of `pack_to` tokens, or a row for each tree.

    A sample is that of the chosen answer, with that of the rejected one under "rejected"; or, to
    be unpaired, that of one answer with "liked". Unpaired answers of a batch are moved on by one
    row: the second branch of a tree is the answer of the row before, of the first the last row's.

    Beside tokens, labels, input_pos and encoder_input a batch has "spans" int [b, s, 2], number of
    the tree and of the branch of each token; "image_index" int [m], which of the embeddings stands
    at each placeholder, and "placeholder_rows" int [m], where that is; of each tree "samples", the
    number of its sample in the step, and "liked"; where the samples have it, "reference" [t, 2].

    Args:
        padding_idx: token at padding
        placeholders: tokens that stand for images and videos
        batch_size: trees of a batch that is not packed
        pack_to: most tokens of a packed row; None pads
        paired: whether samples are pairs; unpaired ones cannot be packed
        across_batches: whether the embeddings of a step are kept, so that a batch encodes only
            what no earlier batch of the step has shown
        mask: "flex", for CUDA, pads every packed row to `pack_to` rounded up to whole blocks
    """

    def __init__(
        self,
        padding_idx: int,
        placeholders: Sequence[int],
        *,
        batch_size: int,
        pack_to: int | None,
        paired: bool = True,
        across_batches: bool = False,
        mask: Mask = "dense",
    ) -> None:
        self.placeholders = torch.tensor(placeholders)
        self.batch_size = batch_size
        self.pack_to = pack_to
        self.paired = paired
        self.across_batches = across_batches
        self.width = pack_to if mask == "flex" else None
        self.fills = {
            "tokens": padding_idx,
            "labels": CROSS_ENTROPY_IGNORE_IDX,
            "input_pos": 0,
            "embeds": TEXT,
            "spans": PADDING,
        }

    def __call__(self, samples: Sequence[Sample]) -> StepBatches:
        """Collate all samples of a step.

        Raises:
            ValueError: if a sample is a pair and none is asked for, or the other way round, or a
                tree is longer than a packed row.
        """
        images = Images()
        every = list(range(len(samples)))
        groups = [every[k : k + self.batch_size] for k in every[:: self.batch_size]]
        trees = self._trees(samples, groups, images)
        lengths = [len(tree["tokens"]) for tree in trees]
        if self.pack_to is not None:
            groups = plan_rows(lengths, self.pack_to)
        encoded, batches, grids = Encoded(images), [], []
        for group in groups:
            encoded = encoded if self.across_batches else Encoded(images)
            batch = self._collate([trees[k] for k in group])
            batch["image_index"], new = encoded.show(batch["image_index"])
            batch["samples"] = torch.tensor(group)
            marks = self._marks([samples[k] for k in group])
            batches.append(batch | encoded.encoder_input(new) | marks)
            grids.append([images.grids[k] for k in new])
        return StepBatches(
            batches=batches,
            lengths=[[lengths[k] for k in group] for group in groups],
            grids=grids,
            labels=[len(label_rows(batch)) for batch in batches],
        )

    def _trees(
        self, samples: Sequence[Sample], groups: Sequence[Sequence[int]], images: Images
    ) -> list[Row]:
        """Plant the tree of each sample, of which a group becomes a batch if it is not packed."""
        _check_kind(samples, paired=self.paired)
        answers = [self._answer(sample, images) for sample in samples]
        if self.paired:
            others = [self._answer(sample["rejected"], images) for sample in samples]
        else:
            before = {k: group[i - 1] for group in groups for i, k in enumerate(group)}
            others = [_moved(answers[before[k]], answers[k]) for k in range(len(samples))]
        return [plant(*both) for both in zip(answers, others, strict=True)]

    def _marks(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return what a batch has of its samples beside their trees."""
        marks = {"liked": torch.tensor([sample.get("liked", True) for sample in samples])}
        if "reference" in samples[0]:
            marks["reference"] = torch.stack([torch.as_tensor(s["reference"]) for s in samples])
        return marks

    def _answer(self, sample: Sample, images: Images) -> Row:
        names = ("tokens", "labels", "input_pos")
        row = {name: torch.as_tensor(np.asarray(sample[name])) for name in names}
        row["labels"] = row["labels"].clone()
        row["labels"][0] = CROSS_ENTROPY_IGNORE_IDX  # else what stands before would predict it
        row["embeds"] = torch.full_like(row["tokens"], TEXT)
        row["embeds"][torch.isin(row["tokens"], self.placeholders)] = images.numbers(sample)
        return row

    def _collate(self, trees: Sequence[Row]) -> Batch:
        owned = [
            tree | {"spans": pad(tree["branch"][:, None], (1, 0), value=k)}
            for k, tree in enumerate(trees)
        ]
        rows = owned if self.pack_to is None else [_joined(*owned)]
        batch = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
            for name, fill in self.fills.items()
        }
        if self.width is not None:
            missing = round_up(self.width, FLEX_BLOCK) - batch["tokens"].shape[1]
            for name, fill in self.fills.items():
                last = (0, 0) * (batch[name].ndim - 2)
                batch[name] = pad(batch[name], (*last, 0, missing), value=fill)
        embeds = batch.pop("embeds")
        shown = embeds != TEXT  # [b, s]
        places = shown.flatten().nonzero()[:, 0]  # [m]
        return batch | {"image_index": embeds[shown], "placeholder_rows": places}


def place_trees(
    data: StepBatches,
    device: torch.device,
    *,
    mask: Mask = "dense",
    dtype: torch.dtype | None = None,
) -> None:
    """Move batches of trees, in place, and make their masks there; see `TreeCollate`.

    `dtype` is that of `batch_to_device`.
    """
    for batch in data.batches:
        batch_to_device(batch, device, dtype)
        batch["mask"] = tree_mask(batch["spans"], flex=mask == "flex")


def _check_kind(samples: Sequence[Sample], *, paired: bool) -> None:
    if paired and not all("rejected" in sample for sample in samples):
        raise ValueError(
            "the loss compares a chosen with a rejected answer, but a row has one answer alone, "
            "marked by whether it was liked; set loss.name to kto"
        )
    if not paired and not all("liked" in sample for sample in samples):
        raise ValueError(
            "the loss kto takes answers that were liked or not, but a row is a pair of a chosen "
            "and a rejected one; set loss.name to dpo or another loss of pairs"
        )


def plant(own: Row, *others: Row) -> Row:
    """Plant answers: what they begin with alike, and the rest of each; with "branch" [s]."""
    shared = min(map(prompt_length, (own, *others)))
    for other in others:
        for name in ("tokens", "input_pos", "embeds"):
            differs = (own[name][:shared] != other[name][:shared]).unsqueeze(-1).flatten(1).any(-1)
            shared = int(differs.int().argmax()) if differs.any() else shared
    pieces = [_cut(own, 0, shared), *(_cut(answer, shared) for answer in (own, *others))]
    numbers = [torch.full_like(piece["tokens"], k) for k, piece in enumerate(pieces)]
    return _joined(*pieces) | {"branch": torch.cat(numbers)}


def _moved(answer: Row, prompt: Row) -> Row:
    """Return a prompt with the answer to another one, at the positions that follow."""
    start, end = prompt_length(answer), prompt_length(prompt)
    if start == len(answer["tokens"]) or end == len(prompt["tokens"]):  # one does not count
        return _cut(prompt, 0, end)
    head, tail = _cut(prompt, 0, end + 1), _cut(answer, start + 1)
    head["labels"] = torch.cat([head["labels"][:end], answer["labels"][start : start + 1]])
    tail["input_pos"] = tail["input_pos"] - answer["input_pos"][start] + prompt["input_pos"][end]
    return _joined(head, tail)


def prompt_length(answer: Row) -> int:
    """Count the tokens before the first that predicts a label; all where there is none."""
    predicts = labelled_rows(answer["labels"][None])[0]
    return int(predicts.int().argmax()) if predicts.any() else len(predicts)


def _cut(row: Row, start: int, end: int | None = None) -> Row:
    return {name: field[start:end] for name, field in row.items()}


def _joined(*rows: Row) -> Row:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
