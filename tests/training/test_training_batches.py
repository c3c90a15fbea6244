"""Rows of a step: padded or packed, the training is the same."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_samples import Transform, sample

from parity.faults import FAULTS
from torchtune_qwen25vl.training import (
    StepCollate,
    equal_numbers,
    summed_loss,
    to_device,
    train_step,
)
from torchtune_qwen25vl.training._batches import plan_rows
from torchtune_qwen25vl.training._masks import FLEX_BLOCK

MIXED = ["text", "image", "two images", "video", "short", "image"]


def collate(kinds, pack_to, batch_size=3, **options):
    samples = [sample(kind, seed) for seed, kind in enumerate(kinds)]
    return StepCollate(Transform.pad_id, batch_size=batch_size, pack_to=pack_to, **options)(samples)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(100, 300))
def test_rows_hold_every_sample_once_and_are_few(lengths, budget):
    rows = plan_rows(lengths, budget)
    assert sorted(k for row in rows for k in row) == list(range(len(lengths)))
    totals = [sum(lengths[k] for k in row) for row in rows]
    assert max(totals) <= budget
    assert sum(total <= budget / 2 for total in totals) <= 1  # two such rows would be one


def test_a_sample_that_no_row_holds_is_refused():
    with pytest.raises(
        ValueError, match="sample of 12 tokens does not fit into rows of pack_to 10"
    ):
        plan_rows([3, 12], 10)


def test_padded_batches_follow_the_order_of_the_samples():
    data = collate(MIXED, None, batch_size=4)
    assert [len(batch["tokens"]) for batch in data.batches] == [4, 2]
    assert data.lengths == [[15, 29, 27, 33], [6, 29]]
    assert data.grids[0] == [[1, 6, 10], [1, 4, 4], [1, 6, 4], [3, 4, 6]]
    assert data.labels == [9 + 7 + 8 + 9, 4 + 7]


@pytest.mark.parametrize("mask", ["dense", "lengths"])
@pytest.mark.parametrize("pack_to", [200, 64, 50])
def test_packed_equals_padded(pack_to, mask):
    """In loss and every gradient; fp64, because in fp32 both differ by more from the truth."""
    model = tiny.model().double().train()
    found = []
    for how in (None, pack_to):
        data = collate(MIXED, how, mask=mask)
        loss = sum(summed_loss(model, batch) for batch in data.batches) / sum(data.labels)
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (padded, gradients), (packed, packed_gradients) = found
    assert abs(packed - padded) <= 1e-6 * padded
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
        assert gradient.any(), name


def test_packed_equals_padded_in_fp32():
    model = tiny.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    results, gradients = [], []
    for how in (None, 64):
        seen = {}

        def look(model, *, has_media, seen=seen):
            seen |= {n: p.grad.clone() for n, p in model.named_parameters()}

        results.append(train_step(model, optimizer, collate(MIXED, how).batches, check=look))
        gradients.append(seen)
    assert results[0].labels == results[1].labels
    assert abs(results[0].loss - results[1].loss) <= 1e-6 * results[0].loss
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-6, name


def test_the_comparison_sees_samples_that_see_each_other():
    model = tiny.model()
    losses = []
    for how in (None, 200):
        with FAULTS["packed samples see each other"].seed(), torch.no_grad():
            losses.append(float(summed_loss(model, collate(MIXED, how, batch_size=9).batches[0])))
    assert abs(losses[1] - losses[0]) > 1e-4 * losses[0]


@pytest.mark.parametrize("mask", ["dense", "lengths"])
@pytest.mark.parametrize("changed", range(4))
def test_packed_samples_do_not_leak(changed, mask):
    """Another sample's tokens and pixels leave the logits of the rest as they are, bit for bit."""
    model = tiny.model()
    kinds = MIXED[:4]
    samples = [sample(kind, seed) for seed, kind in enumerate(kinds)]
    owner = torch.arange(4).repeat_interleave(torch.tensor([len(s["tokens"]) for s in samples]))
    other = [*samples]
    other[changed] = sample(kinds[changed], 99)
    logits = []
    for these in (samples, other):
        data = StepCollate(Transform.pad_id, batch_size=1, pack_to=200, mask=mask)(these)
        (batch,) = data.batches
        del batch["labels"], batch["label_rows"]
        with torch.no_grad():
            logits.append(model(**batch)[0])
    same = (logits[0] == logits[1]).all(-1)
    assert same[owner != changed].all()
    assert not same[owner == changed].any()


def test_flex_rows_are_of_one_width_without_a_dense_mask():
    """Of whole blocks; another width would be another kernel to compile."""
    for kinds, labels in ((MIXED, 44), (["short"], 4)):
        data = collate(kinds, 200, mask="flex")
        (batch,) = data.batches
        assert "mask" not in batch
        assert batch["tokens"].shape == (1, 2 * FLEX_BLOCK)
        assert data.labels == [labels]
    widths = {batch["tokens"].shape[1] for batch in collate(MIXED, 64, mask="flex").batches}
    assert widths == {FLEX_BLOCK}


def test_batches_keep_their_number_on_one_rank():
    data = collate(MIXED, 64)
    to_device(data, torch.device("cpu"))
    assert equal_numbers(data, torch.device("cpu")) is data


def test_labels_come_as_torchtune_makes_them():
    """Its dataset makes a list of numpy integers."""
    given = sample("text", 0)
    listed = {**given, "labels": [np.int64(label) for label in given["labels"]]}
    make = StepCollate(Transform.pad_id, batch_size=1, pack_to=None)
    assert torch.equal(make([given]).batches[0]["labels"], make([listed]).batches[0]["labels"])
