"""Seeded faults: each patches our package while its context is open, and a stage must see it."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor

from torchtune_qwen25vl import _position_ids

Fault = Callable[[], AbstractContextManager]


def _resume_one_late() -> AbstractContextManager:
    right = _position_ids._grid_positions

    def wrong(frames: int, height: int, width: int, per_frame: float) -> Tensor:
        positions = right(frames, height, width, per_frame)
        positions[-1, 0] += 1 + positions.max() - positions[-1, 0]
        return positions

    return mock.patch.object(_position_ids, "_grid_positions", wrong)


def _small_windows() -> AbstractContextManager:
    right = _position_ids._windows

    @functools.wraps(right)
    def wrong(frames: int, height: int, width: int, side: int) -> Tensor:
        return right(frames, height, width, side // 2)

    return mock.patch.object(_position_ids, "_windows", wrong)


FAULTS: dict[str, Fault] = {
    "text after media resumes one late": _resume_one_late,
    "windows of 56 px": _small_windows,
}
