"""Faults of positions and window order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl import mrope_position_ids
from torchtune_qwen25vl._position_ids import window_order


def _resume_one_late(right: Callable) -> Callable:
    def wrong(tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        placeholders = torch.tensor([options["image_token_id"], options["video_token_id"]])
        is_medium = torch.isin(tokens, placeholders)
        ends = is_medium[:, :-1] & ~is_medium[:, 1:]  # [b, s - 1]
        late = torch.nn.functional.pad(ends.cumsum(1), (1, 0))  # media that stand before a token
        return right(tokens, *args, **options) + late.unsqueeze(-1)

    return wrong


def _swap_rows_and_columns(right: Callable) -> Callable:
    return lambda *args, **options: right(*args, **options)[..., [0, 2, 1]]


def _no_time(right: Callable) -> Callable:
    def wrong(
        tokens: Tensor, images: Tensor, videos: Tensor, seconds: Any, **options: Any
    ) -> Tensor:
        return right(tokens, images, videos, [0.0] * len(seconds), **options)

    return wrong


def _time_in_fp64(right: Callable) -> Callable:
    def wrong(
        tokens: Tensor, images: Tensor, videos: Tensor, seconds: Any, **options: Any
    ) -> Tensor:
        positions = right(tokens, images, videos, seconds, **options)
        early = [
            (_times(t, second, torch.float64) - _times(t, second, torch.float32)).repeat_interleave(
                h * w // 4
            )
            for (t, h, w), second in zip(
                videos.tolist(), torch.tensor(seconds).tolist(), strict=True
            )
        ]
        if early:
            positions[..., 0][tokens == options["video_token_id"]] += torch.cat(early)
        return positions

    return wrong


def _times(frames: int, seconds: float, dtype: torch.dtype) -> Tensor:
    """Temporal position of each frame group, int64 [frames]."""
    return (torch.arange(frames, dtype=dtype) * (2 * seconds)).long()


def _round_seconds(right: Callable) -> Callable:
    def wrong(
        tokens: Tensor, images: Tensor, videos: Tensor, seconds: Any, **options: Any
    ) -> Tensor:
        return right(tokens, images, videos, [round(s, 1) for s in seconds], **options)

    return wrong


def _half_windows(right: Callable) -> Callable:
    return lambda grid_thw, *, window_size, **sizes: right(
        grid_thw, window_size=window_size // 2, **sizes
    )


def _columns_first(right: Callable) -> Callable:
    """Units of a window are visited column by column; its length stays."""

    def wrong(grid_thw: Any, *, spatial_merge_size: int, **sizes: Any) -> tuple[Tensor, list[int]]:
        order, lengths = right(grid_thw, spatial_merge_size=spatial_merge_size, **sizes)
        columns = torch.cat(
            [
                torch.arange(w // spatial_merge_size).repeat(t * h // spatial_merge_size)
                for t, h, w in grid_thw
            ]
        )  # [m]
        windows = order.split([length // spatial_merge_size**2 for length in lengths])
        return torch.cat([unit[columns[unit].argsort(stable=True)] for unit in windows]), lengths

    return wrong


FAULTS: dict[str, Fault] = {
    "text after media resumes one late": replaced(
        mrope_position_ids, _resume_one_late, "positions"
    ),
    "rows and columns of M-RoPE swapped": replaced(
        mrope_position_ids, _swap_rows_and_columns, "positions"
    ),
    "seconds of videos ignored": replaced(mrope_position_ids, _no_time, "positions"),
    "time of frames in fp64": replaced(mrope_position_ids, _time_in_fp64, "positions"),
    "seconds rounded to 0.1": replaced(mrope_position_ids, _round_seconds, "positions"),
    "windows of 56 px": replaced(window_order, _half_windows, "window order"),
    "windows read by columns": replaced(window_order, _columns_first, "window order"),
}
