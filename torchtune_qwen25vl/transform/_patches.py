"""Frames of one size to normalised patches, strip by strip.

No float copy of a frame is ever held: a strip of rows is normalised, brought into block order and
written to its place. `_straight.py` says the same in a few lines, and a test holds both to the same
bits.

Shapes: h w height and width in pixels, s patch_size, m merge_size, t temporal_patch_size,
g_t g_h g_w the grid in patches (`grid_thw`), p = g_t * g_h * g_w patches.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchtune_qwen25vl.transform._pixels import strips

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
WORK_BYTES = 1 << 20  # of floats, worked on at once: few enough to stay in the cache


class Patchify:
    """The cutter of frames of one size into normalised patches in block order.

    The `merge_size` x `merge_size` patches that become one placeholder are neighbours; a patch
    holds its values as [c, t, s, s]. The last frame is repeated where `temporal_patch_size` asks
    for more frames: an image fills both halves of its patches.

    Args:
        patch_size: pixels on each side of a patch
        merge_size: patches on each side of a placeholder
        temporal_patch_size: frames in a patch
        image_mean: mean of each channel, where full intensity is 1
        image_std: standard deviation of each channel, where full intensity is 1
        dtype: dtype of the patches; the arithmetic is float32 in any case
    """

    def __init__(
        self,
        *,
        patch_size: int,
        merge_size: int,
        temporal_patch_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        dtype: torch.dtype,
    ) -> None:
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.temporal_patch_size = temporal_patch_size
        mean_and_std = 255 * torch.tensor([image_mean, image_std], dtype=torch.float32)
        self.mean, self.std = mean_and_std.view(2, -1, 1, 1)  # [c, 1, 1]
        self.dtype = dtype

    @property
    def factor(self) -> int:
        """Return the pixels on each side of a placeholder."""
        return self.patch_size * self.merge_size

    def __call__(
        self, frames: Iterable[Tensor], num_frames: int, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Cut uint8 frames [3 or 4, h, w] into patches [p, 3 * t * s * s] of a grid, [1, 3].

        The frames come one at a time, `num_frames` of them; a fourth channel is not read.
        """
        t, s, m = self.temporal_patch_size, self.patch_size, self.merge_size
        grid = [-(-num_frames // t), height // s, width // s]
        patches = torch.empty(math.prod(grid), 3 * t * s * s, dtype=self.dtype)
        blocks = patches.view(grid[0], grid[1] // m, grid[2] // m, m, m, 3, t, s, s)
        for k, frame in enumerate(frames):
            last = t if k + 1 == num_frames else k % t + 1
            self._write(frame, blocks[k // t, ..., k % t : last, :, :])
        return patches, torch.tensor([grid])

    def _write(self, frame: Tensor, blocks: Tensor) -> None:
        """Write a frame [3 or 4, h, w] into [g_h / m, g_w / m, m, m, 3, t, s, s], t times over."""
        s, m = self.patch_size, self.merge_size
        mean, std = _row(self.mean, frame), _row(self.std, frame)
        for rows in strips(len(blocks), WORK_BYTES // (4 * frame[:, : s * m].numel())):
            strip = frame[:, rows.start * s * m : rows.stop * s * m]
            values = _in_blocks(strip.to(torch.float32).sub_(mean).div_(std)[:3], m, s)
            blocks[rows] = values.unsqueeze(-3)
            del values  # before the next ones are made


def _in_blocks(strip: Tensor, m: int, s: int) -> Tensor:
    """Return a strip [3, h, w] as [h / (m * s), w / (m * s), m, m, 3, s, s], contiguous."""
    parts = strip.unflatten(2, (-1, m, s)).unflatten(1, (-1, m, s))
    return parts.permute(1, 4, 2, 5, 0, 3, 6).contiguous()


def _row(values: Tensor, frame: Tensor) -> Tensor:
    """Return a value per channel as a row [3 or 4, 1, w], in the memory order of the frame."""
    row = torch.ones_like(frame[:, :1], dtype=torch.float32)
    row[:3] = values
    return row
