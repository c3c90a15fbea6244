"""Packed rows: few of them, each full to its last token, and equally many on every rank."""

import pytest
import torch
from training_samples import Transform, sample

from torchtune_qwen25vl.training import StepCollate, equal_numbers
from torchtune_qwen25vl.training._batches import plan_rows


@pytest.mark.parametrize(
    ("lengths", "budget", "rows"),
    [
        ([1, 1, 5, 5], 6, [[0, 2], [1, 3]]),  # the shortest first would need three rows
        ([3, 3], 6, [[0, 1]]),  # to the last token
        ([3, 4], 6, [[1], [0]]),
        ([6, 1, 6], 6, [[0], [2], [1]]),
        ([2, 2, 2, 2], 4, [[0, 1], [2, 3]]),  # of equal length in their order
    ],
)
def test_rows_are_filled_from_the_longest_sample_on(lengths, budget, rows):
    assert plan_rows(lengths, budget) == rows


@pytest.mark.parametrize("most", [2, 4])
def test_a_rank_with_fewer_rows_repeats_its_last_without_labels(most, monkeypatch):
    samples = [sample(kind, seed) for seed, kind in enumerate(("image", "text", "video"))]
    data = StepCollate(Transform.pad_id, batch_size=2, pack_to=None)(samples)
    assert len(data.batches) == 2
    assert equal_numbers(data, torch.device("cpu")) is data  # one rank alone
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number, _: number.fill_(most))
    equal = equal_numbers(data, torch.device("cpu"))
    assert {len(part) for part in equal} == {most}
    assert equal.batches[:2] == data.batches
    assert equal.labels == data.labels + [0] * (most - 2)
    for batch in equal.batches[2:]:
        assert (batch["labels"] == -100).all()
        assert batch["tokens"] is data.batches[1]["tokens"]
        assert batch["encoder_input"] is data.batches[1]["encoder_input"]
    assert (data.batches[1]["labels"] != -100).any()
