"""Samples of a step to batches: padded, or packed into rows of a token budget.

Rows are packed within a step: it sees the same samples packed or padded, and no buffer outlives it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.model import has_segment_kernel
from torchtune_qwen25vl.training._masks import FLEX_BLOCK, sample_spans, tree_mask
from torchtune_qwen25vl.training._step import label_rows, weigh
from torchtune_qwen25vl.transform import batch_to_device, packed_collate, padded_collate, round_up

Batch = dict[str, Any]
Mask = Literal["dense", "lengths", "flex"]


def row_mask(device: torch.device) -> Mask:
    """Choose how the samples of packed rows are told apart on a device, see `StepCollate`."""
    return "flex" if device.type == "cuda" and not has_segment_kernel() else "lengths"


class StepBatches(NamedTuple):
    """One rank's share of one step; each batch goes through the model at once."""

    batches: list[Batch]
    lengths: list[list[int]]  # of each batch: tokens of each sample
    grids: list[list[list[int]]]  # of each batch: (t, h, w) of each image and video
    labels: list[int]  # of each batch: how many


class StepCollate:
    """Samples of a step to batches: rows of `pack_to` tokens, or `batch_size` samples padded.

    Args:
        padding_idx: token at padding
        batch_size: samples padded to one batch
        pack_to: most tokens of a packed row; None pads
        mask: what packed rows are masked by: "dense" [1, s, s]; "lengths" of the samples [n];
            "flex" leaves it to `to_device`, for CUDA, and pads every row to `pack_to` rounded up to
            whole blocks
    """

    def __init__(
        self, padding_idx: int, *, batch_size: int, pack_to: int | None, mask: Mask = "dense"
    ) -> None:
        self.padding_idx = padding_idx
        self.batch_size = batch_size
        self.pack_to = pack_to
        self.mask = mask

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> StepBatches:
        """Collate all samples of a step."""
        lengths = [len(sample["tokens"]) for sample in samples]
        if self.pack_to is None:
            every = list(range(len(samples)))
            rows = [every[k : k + self.batch_size] for k in every[:: self.batch_size]]
        else:
            rows = plan_rows(lengths, self.pack_to)
        chosen = [[samples[k] for k in row] for row in rows]
        batches = [self._collate(row) for row in chosen]
        for batch in batches:
            batch["label_rows"] = label_rows(batch)
            if "label_weights" in batch:
                batch |= weigh(batch)
        return StepBatches(
            batches=batches,
            lengths=[[lengths[k] for k in row] for row in rows],
            grids=[[grid for sample in row for grid in _grids(sample)] for row in chosen],
            labels=[len(batch["label_rows"]) for batch in batches],
        )

    def _collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        if self.pack_to is None:
            return padded_collate(samples, self.padding_idx, label_weights=True)
        # Flex rows are all of one width. torchtune compiles flex attention for fixed shapes: each
        # other width would be compiled anew, and beyond torch's limit of 8 run as it is written,
        # holding [s, s] scores of every head.
        width = round_up(self.pack_to, FLEX_BLOCK) if self.mask == "flex" else 1
        batch = packed_collate(
            samples,
            self.padding_idx,
            pad_to_multiple_of=width,
            dense_mask=self.mask == "dense",
            label_weights=True,
        )
        if self.mask == "lengths":
            batch["mask"] = torch.tensor([len(sample["tokens"]) for sample in samples])
        return batch


def plan_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Distribute samples over rows: the longest first, each into the first row where it fits.

    Args:
        lengths: tokens of each sample
        budget: most tokens of a row

    Returns:
        The samples of each row, in ascending order

    Raises:
        ValueError: if a sample is longer than a row.
    """
    if max(lengths) > budget:
        raise ValueError(
            f"a sample of {max(lengths)} tokens does not fit into rows of pack_to {budget}; "
            "raise pack_to, or lower the transform's max_pixels or max_seq_len"
        )
    rows: list[list[int]] = []
    space: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        row = next((r for r, left in enumerate(space) if left >= lengths[sample]), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(budget)
        rows[row].append(sample)
        space[row] -= lengths[sample]
    return [sorted(row) for row in rows]


def to_device(
    data: StepBatches,
    device: torch.device,
    *,
    mask: Mask = "dense",
    dtype: torch.dtype | None = None,
) -> None:
    """Move the batches, in place; see `StepCollate` for `mask`, `batch_to_device` for `dtype`."""
    for batch, lengths in zip(data.batches, data.lengths, strict=True):
        batch_to_device(batch, device, dtype)
        if mask == "flex":
            padding = batch["tokens"].shape[1] - sum(lengths)
            spans = sample_spans([*lengths, padding], device)
            batch["mask"] = tree_mask(spans, flex=True)


def equal_numbers(data: StepBatches, device: torch.device) -> StepBatches:
    """As many batches on every rank: those with fewer repeat their last, its labels ignored.

    Packing may need more rows on one rank than on another, and sharded ranks run in step.
    """
    missing = _ranks.largest(len(data.batches), device) - len(data.batches)
    if not missing:
        return data
    last = data.batches[-1]
    unlabelled = {
        "labels": torch.full_like(last["labels"], CROSS_ENTROPY_IGNORE_IDX),
        "label_rows": last["label_rows"][:0],
    }
    if "label_weights" in last:
        unlabelled |= {"label_weights": last["label_weights"][:0], "total_weight": 0.0}
    return StepBatches(
        batches=data.batches + [{**last, **unlabelled}] * missing,
        lengths=data.lengths + [[]] * missing,
        grids=data.grids + [[]] * missing,
        labels=data.labels + [0] * missing,
    )


def _grids(sample: Mapping[str, Any]) -> list[list[int]]:
    if "encoder_input" not in sample:
        return []
    return sample["encoder_input"]["vision"]["grid_thw"].tolist()
