"""Samples to one batch: side by side with padding, or packed into a single row.

Both return keyword arguments of the model, and the labels for the loss:

    tokens     [b, s]
    labels     [b, s], where the samples have them
    input_pos  [b, s, 3]
    mask       [b, s, s], True where a query (row) may attend to a key (column); left padded or
               packed only: right padding needs none, as the causal order hides it
    label_weights fp32 [b, s], laid out as the labels; where a sample has them
    placeholder_rows int64 [m], where placeholders are among the b * s tokens, so that the model
               need not ask its device; where all samples tell
    encoder_input {"vision": {"pixel_values": [p, patch], "grid_thw": [i, 3]}}, the images and
               videos of all samples in order; absent where no sample has any

Shapes: b batch, s sequence, n samples, p patches, i images and videos.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl._torchtune import labelled_rows

Sample = Mapping[str, Any]


def padded_collate(
    batch: Sequence[Sample],
    padding_idx: int,
    ignore_idx: int = CROSS_ENTROPY_IGNORE_IDX,
    *,
    padding_side: Literal["left", "right"] = "right",
    pad_to_multiple_of: int = 1,
    label_weights: bool = False,
    cp_degree: int = 1,
) -> dict[str, Any]:
    """Make a batch with one row for each sample, padded to the longest.

    Labels are laid out as they come: torchtune 0.6.1 shifts them in its recipes, its development
    version in its dataset.

    Args:
        batch: samples of `Qwen25VLTransform`, with the labels torchtune's dataset made or its own
        padding_idx: token at padding, `tokenizer.pad_id`
        ignore_idx: label at padding
        padding_side: "right" to train, or "left" to generate, which adds a mask in which a padding
            token attends to itself
        pad_to_multiple_of: number of which the length of the rows is a multiple
        label_weights: whether the loss heeds weights of labels, which are then in the batch where a
            sample has them
        cp_degree: devices that share one row; only 1 is possible

    Raises:
        ValueError: where a sample lacks a field, some samples have labels and others none, one has
            weights that are not heeded, or `cp_degree` is over 1.
    """
    _refuse_context_parallel(cp_degree)
    rows = _rows(batch, label_weights)
    lengths = torch.tensor([len(row["tokens"]) for row in rows])  # [b]
    width = round_up(int(lengths.max()), pad_to_multiple_of)
    fills = _fills(padding_idx, ignore_idx)
    collated: dict[str, Any] = {
        name: torch.stack([_pad(row[name], width, fills[name], padding_side) for row in rows])
        for name in rows[0]
    }
    if padding_side == "left":
        collated["mask"] = _left_padded_mask(lengths, width)
    return _indexed(collated) | _encoder_input(batch)


def packed_collate(
    batch: Sequence[Sample],
    padding_idx: int,
    ignore_idx: int = CROSS_ENTROPY_IGNORE_IDX,
    *,
    pad_to_multiple_of: int = 1,
    dense_mask: bool = True,
    label_weights: bool = False,
    cp_degree: int = 1,
) -> dict[str, Any]:
    """Make a batch of one row that holds all samples, none of which sees another.

    Every sample keeps its own positions. Its first label is dropped: torchtune 0.6.1 shifts labels
    along the whole row, and would ask the last token of the sample before to predict it. In a
    conversation nothing is lost, as its first tokens are a header.

    Args:
        batch: samples of `Qwen25VLTransform`, with the labels torchtune's dataset made or its own
        padding_idx: token at padding, `tokenizer.pad_id`
        ignore_idx: label at padding
        pad_to_multiple_of: number of which the length of the row is a multiple; padding sees itself
        dense_mask: whether to make the mask [1, s, s]; without it the caller tells samples apart
        label_weights: whether the loss heeds weights of labels, which are then in the batch where a
            sample has them
        cp_degree: devices that share one row; only 1 is possible

    Raises:
        ValueError: where a sample lacks a field, some samples have labels and others none, one has
            weights that are not heeded, or `cp_degree` is over 1.
    """
    _refuse_context_parallel(cp_degree)
    rows = _rows(batch, label_weights)
    for row in rows:
        if "labels" in row:
            row["labels"] = row["labels"].clone()
            row["labels"][0] = ignore_idx
    lengths = [len(row["tokens"]) for row in rows]
    width = round_up(sum(lengths), pad_to_multiple_of)
    fills = _fills(padding_idx, ignore_idx)
    collated: dict[str, Any] = {
        name: _pad(torch.cat([row[name] for row in rows]), width, fills[name], "right")[None]
        for name in rows[0]
    }
    if dense_mask:
        collated["mask"] = _block_causal_mask([*lengths, width - sum(lengths)])
    return _indexed(collated) | _encoder_input(batch)


def padded_collate_labelled(
    batch: Sequence[Sample], padding_idx: int, ignore_idx: int = CROSS_ENTROPY_IGNORE_IDX, **kw: Any
) -> dict[str, Any]:
    """Do as `padded_collate`, and ask the model for labelled rows only, for `LabelledRowsLoss`."""
    return _labelled(padded_collate(batch, padding_idx, ignore_idx, **kw), ignore_idx)


def packed_collate_labelled(
    batch: Sequence[Sample], padding_idx: int, ignore_idx: int = CROSS_ENTROPY_IGNORE_IDX, **kw: Any
) -> dict[str, Any]:
    """Do as `packed_collate`, and ask the model for labelled rows only, for `LabelledRowsLoss`."""
    return _labelled(packed_collate(batch, padding_idx, ignore_idx, **kw), ignore_idx)


def _labelled(batch: dict[str, Any], ignore_idx: int) -> dict[str, Any]:
    if "labels" not in batch:
        raise ValueError(
            "the rows whose logits are read are those with labels, but the samples have none "
            "(inference=True makes none); use padded_collate or packed_collate"
        )
    return batch | {"output_mask": labelled_rows(batch["labels"], ignore_idx)}


def _rows(batch: Sequence[Sample], label_weights: bool) -> list[dict[str, Tensor]]:
    """Return the fields of each sample that become rows, with labels if all samples have them."""
    if weighted := any("label_weights" in sample for sample in batch):
        if not label_weights:
            raise ValueError(
                "weights of rows and messages are heeded by the recipe finetune, but not by this "
                "one; leave weights other than 0 and 1 out"
            )
        batch = [{"label_weights": torch.ones(len(s["tokens"])), **s} for s in batch]
    labelled = sum("labels" in sample for sample in batch)
    if labelled not in (0, len(batch)):
        raise ValueError(
            f"all samples of a batch have labels or none has, but {labelled} of {len(batch)} have; "
            "samples made with inference=True have none"
        )
    fields = ["tokens", "labels", "input_pos"] if labelled else ["tokens", "input_pos"]
    if all("placeholders" in sample for sample in batch):
        fields.append("placeholders")
    if weighted:
        fields.append("label_weights")
    return [_row(sample, fields) for sample in batch]


def _row(sample: Sample, fields: Sequence[str]) -> dict[str, Tensor]:
    if missing := [name for name in fields if name not in sample]:
        raise ValueError(
            f"a sample needs {', '.join(fields)}, this one lacks {', '.join(missing)}; it should "
            "come from Qwen25VLTransform"
        )
    # torchtune's dataset makes a list of numpy integers of the labels
    row = {name: torch.as_tensor(np.asarray(sample[name])) for name in fields}
    if len(set(map(len, row.values()))) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in row.items())
        raise ValueError(f"the fields of a sample are of one length, got {lengths}; cut all alike")
    return row


def _fills(padding_idx: int, ignore_idx: int) -> dict[str, int]:
    """Return what stands at padding."""
    return {
        "tokens": padding_idx,
        "labels": ignore_idx,
        "input_pos": 0,
        "placeholders": False,
        "label_weights": 0,
    }


def _indexed(collated: dict[str, Any]) -> dict[str, Any]:
    """Tell placeholders by their indices."""
    if (placeholders := collated.pop("placeholders", None)) is None:
        return collated
    return collated | {"placeholder_rows": placeholders.flatten().nonzero()[:, 0]}


def _pad(values: Tensor, width: int, fill: int, side: str) -> Tensor:
    padded = values.new_full((width, *values.shape[1:]), fill)
    start = width - len(values) if side == "left" else 0
    padded[start : start + len(values)] = values
    return padded


def round_up(length: int, multiple: int) -> int:
    """Round a length up to a multiple."""
    return -(-length // multiple) * multiple


def _left_padded_mask(lengths: Tensor, width: int) -> Tensor:
    index = torch.arange(width)
    is_token = index >= (width - lengths).unsqueeze(1)  # [b, s]
    causal = index.unsqueeze(1) >= index  # [s, s]
    return causal & is_token.unsqueeze(1) | torch.eye(width, dtype=torch.bool)  # [b, s, s]


def _block_causal_mask(lengths: Sequence[int]) -> Tensor:
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # [s]
    return (owner.unsqueeze(1) == owner).tril_().unsqueeze(0)  # [1, s, s]


def _encoder_input(batch: Sequence[Sample]) -> dict[str, Any]:
    vision = [sample["encoder_input"]["vision"] for sample in batch if "encoder_input" in sample]
    if not vision:
        return {}
    fields = ("pixel_values", "grid_thw")
    return {"encoder_input": {"vision": {f: torch.cat([v[f] for v in vision]) for f in fields}}}


def _refuse_context_parallel(cp_degree: int) -> None:
    if cp_degree > 1:
        raise ValueError(
            f"a row with images cannot be split over devices, got cp_degree = {cp_degree}; set "
            "context_parallel_dim to 1"
        )
