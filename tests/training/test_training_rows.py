"""Packed rows: few of them, each full to its last token."""

import pytest

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
