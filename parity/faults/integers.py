"""Faults of positions and window order."""

from collections.abc import Callable

from torch import Tensor

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl import _position_ids


def _resume_one_late(right: Callable) -> Callable:
    def wrong(frames: int, height: int, width: int, per_frame: float) -> Tensor:
        positions = right(frames, height, width, per_frame)
        positions[-1, 0] = 1 + positions.max()
        return positions

    return wrong


def _swap_rows_and_columns(right: Callable) -> Callable:
    return lambda *args: right(*args)[:, [0, 2, 1]]


def _no_time(right: Callable) -> Callable:
    return lambda frames, height, width, per_frame: right(frames, height, width, 0.0)


def _half_windows(right: Callable) -> Callable:
    return lambda frames, height, width, side: right(frames, height, width, side // 2)


FAULTS: dict[str, Fault] = {
    "text after media resumes one late": patched(
        _position_ids, "_grid_positions", _resume_one_late, "positions"
    ),
    "rows and columns of M-RoPE swapped": patched(
        _position_ids, "_grid_positions", _swap_rows_and_columns, "positions"
    ),
    "seconds of videos ignored": patched(_position_ids, "_grid_positions", _no_time, "positions"),
    "windows of 56 px": patched(_position_ids, "_windows", _half_windows, "window order"),
}
