"""Samples to batches: every element of what comes out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.modules.attention_utils import create_block_causal_mask

from torchtune_qwen25vl._torchtune import labelled_rows
from torchtune_qwen25vl.transform._collate import (
    packed_collate,
    packed_collate_labelled,
    padded_collate,
    padded_collate_labelled,
)

PAD = 7


def sample(length, start=10, images=0):
    tokens = torch.arange(start, start + length)
    made = {
        "tokens": tokens,
        "mask": torch.zeros(length, dtype=torch.bool),
        "labels": tokens.clone(),
        "input_pos": torch.stack([tokens, tokens + 100, tokens + 200], -1),
        "id": f"sample {start}",
    }
    if images:
        values = torch.full((4 * images, 1176), float(start))
        grids = torch.tensor([[1, 2, 2]] * images)
        made["encoder_input"] = {"vision": {"pixel_values": values, "grid_thw": grids}}
    return made


BATCH = [sample(3, 10, images=1), sample(5, 20), sample(1, 30, images=2)]


def test_right_padding():
    batch = padded_collate(BATCH, padding_idx=PAD)
    assert batch.keys() == {"tokens", "labels", "input_pos", "encoder_input"}
    tokens = [[10, 11, 12, 7, 7], [20, 21, 22, 23, 24], [30, 7, 7, 7, 7]]
    assert batch["tokens"].tolist() == tokens
    assert batch["labels"].tolist() == [
        [10, 11, 12, IGNORE, IGNORE],
        [20, 21, 22, 23, 24],
        [30, IGNORE, IGNORE, IGNORE, IGNORE],
    ]
    for axis in range(3):
        expected = [[t + 100 * axis if t != PAD else 0 for t in row] for row in tokens]
        assert batch["input_pos"][..., axis].tolist() == expected
    vision = batch["encoder_input"]["vision"]
    assert vision["pixel_values"][:, 0].tolist() == [10.0] * 4 + [30.0] * 8
    assert vision["pixel_values"].shape == (12, 1176)
    assert vision["grid_thw"].tolist() == [[1, 2, 2]] * 3
    assert {batch[name].dtype for name in ("tokens", "labels", "input_pos")} == {torch.int64}


def test_left_padding():
    batch = padded_collate(BATCH, padding_idx=PAD, ignore_idx=-1, padding_side="left")
    assert batch["tokens"].tolist() == [[7, 7, 10, 11, 12], [20, 21, 22, 23, 24], [7, 7, 7, 7, 30]]
    assert batch["labels"].tolist() == [
        [-1, -1, 10, 11, 12],
        [20, 21, 22, 23, 24],
        [-1, -1, -1, -1, 30],
    ]
    assert batch["input_pos"][0, :, 1].tolist() == [0, 0, 110, 111, 112]
    for row, length in enumerate([3, 5, 1]):
        for query in range(5):
            for key in range(5):
                allowed = (key <= query and key >= 5 - length) or key == query
                assert batch["mask"][row, query, key] == allowed


def test_packing():
    batch = packed_collate(BATCH, padding_idx=PAD, pad_to_multiple_of=4)
    pads = [PAD] * 3
    assert batch["tokens"].tolist() == [[10, 11, 12, 20, 21, 22, 23, 24, 30, *pads]]
    labels = [IGNORE, 11, 12, IGNORE, 21, 22, 23, 24, IGNORE, *[IGNORE] * 3]
    assert batch["labels"].tolist() == [labels]
    positions = [10, 11, 12, 20, 21, 22, 23, 24, 30, 0, 0, 0]
    assert batch["input_pos"][0, :, 0].tolist() == positions
    assert batch["input_pos"].shape == (1, 12, 3)
    expected = create_block_causal_mask([torch.tensor([3, 5, 1, 3])])
    assert batch["mask"].dtype == torch.bool
    assert torch.equal(batch["mask"], expected)
    assert batch["encoder_input"]["vision"]["grid_thw"].shape == (3, 3)


def test_packing_leaves_the_samples_as_they_are():
    batch = [sample(3), sample(2)]
    packed_collate(batch, padding_idx=PAD)
    assert batch[0]["labels"].tolist() == [10, 11, 12]


@pytest.mark.parametrize("collate", [padded_collate, packed_collate])
def test_samples_without_labels_make_a_batch_without(collate):
    unlabelled = [{k: v for k, v in made.items() if k != "labels"} for made in BATCH]
    expected, found = collate(BATCH, PAD), collate(unlabelled, PAD)
    assert "labels" in expected
    assert found.keys() == expected.keys() - {"labels"}
    assert all(torch.equal(found[name], expected[name]) for name in ("tokens", "input_pos"))
    with pytest.raises(ValueError, match="have labels or none has, but 2 of 3 have"):
        collate([unlabelled[0], *BATCH[1:]], PAD)


@pytest.mark.parametrize("collate", [padded_collate_labelled, packed_collate_labelled])
def test_labelled_collates_need_labels(collate):
    unlabelled = {k: v for k, v in sample(3).items() if k != "labels"}
    with pytest.raises(ValueError, match="but the samples have none"):
        collate([unlabelled], PAD)


def shifted_loss(logits, labels):
    """The loss of torchtune 0.6.1's recipes: labels shifted along the whole row."""
    labels = torch.hstack([labels[..., 1:], labels.new_full((len(labels), 1), IGNORE)])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def test_a_packed_row_trains_on_what_its_samples_train_on():
    batch = [sample(4, 1), sample(6, 3), sample(2, 5)]
    logits = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    packed = shifted_loss(logits, packed_collate(batch, padding_idx=PAD)["labels"])
    pieces = logits.split([4, 6, 2], dim=1)
    alone = [shifted_loss(p, s["labels"].unsqueeze(0)) for p, s in zip(pieces, batch, strict=True)]
    assert torch.equal(packed, torch.cat(alone))
    naive = torch.cat([s["labels"] for s in batch]).unsqueeze(0)  # the trap: samples predict others
    assert not torch.equal(shifted_loss(logits, naive), torch.cat(alone))


@pytest.mark.parametrize("collate", [padded_collate, packed_collate])
def test_labels_as_torchtunes_dataset_makes_them(collate):
    plain, listed = [sample(3), sample(2, 20)], [sample(3), sample(2, 20)]
    for made in listed:
        made["labels"] = list(np.where(made["mask"], IGNORE, made["tokens"]))
    expected, found = collate(plain, PAD), collate(listed, PAD)
    assert expected["labels"].dtype == found["labels"].dtype
    assert torch.equal(expected["labels"], found["labels"])


@pytest.mark.parametrize("collate", [padded_collate, packed_collate])
def test_without_images_there_is_no_encoder_input(collate):
    assert "encoder_input" not in collate([sample(3), sample(2)], padding_idx=PAD)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_rows_are_padded_to_a_multiple(padding_side):
    options = {"padding_side": padding_side, "pad_to_multiple_of": 4}
    batch = padded_collate([sample(3), sample(5)], padding_idx=PAD, **options)
    assert batch["tokens"].shape == batch["labels"].shape == (2, 8)
    assert batch["input_pos"].shape == (2, 8, 3)
    if padding_side == "left":
        assert batch["mask"].shape == (2, 8, 8)
    exact = padded_collate([sample(3), sample(8)], padding_idx=PAD, **options)
    assert exact["tokens"].shape == (2, 8)


@pytest.mark.parametrize("collate", [padded_collate, packed_collate])
def test_what_cannot_be_collated(collate):
    with pytest.raises(ValueError, match=r"cp_degree = 2; set context_parallel_dim to 1"):
        collate([sample(3)], padding_idx=PAD, cp_degree=2)
    incomplete = sample(3)
    del incomplete["input_pos"]
    with pytest.raises(ValueError, match=r"lacks input_pos; it should come from Qwen25VLTransform"):
        collate([incomplete], padding_idx=PAD)


@pytest.mark.parametrize(
    ("plain", "labelled"),
    [(padded_collate, padded_collate_labelled), (packed_collate, packed_collate_labelled)],
)
def test_labelled_collates_name_the_rows_whose_logits_are_read(plain, labelled):
    samples = [sample(5), sample(3, start=20)]
    samples[0]["labels"][:3] = IGNORE
    batch, expected = labelled(samples, PAD), plain(samples, PAD)
    rows = batch.pop("output_mask")
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)
    assert torch.equal(rows, labelled_rows(batch["labels"]))
    assert rows.any()
    assert not rows.all()
