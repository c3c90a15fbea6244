"""Faults of the picture and video transforms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl import _image_transform
from torchtune_qwen25vl._image_transform import Patchify


def _no_antialias(right: Callable) -> Callable:
    def wrong(pixels: Tensor, height: int, width: int) -> Tensor:
        mode = _image_transform.tvf.InterpolationMode.BICUBIC
        return _image_transform.tvf.resize(
            pixels, [height, width], interpolation=mode, antialias=False
        )

    return wrong


def _pillow(right: Callable) -> Callable:
    def wrong(image: Any, height: int, width: int) -> Tensor:
        if isinstance(image, Tensor):
            return right(image, height, width)
        resized = _image_transform._pillow_rgb(image).resize((width, height), Image.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    return wrong


def _mean_and_std_swapped(right: Callable) -> Callable:
    def wrong(self: Patchify, **settings: Any) -> None:
        mean, std = settings["image_mean"], settings["image_std"]
        right(self, **(settings | {"image_mean": std, "image_std": mean}))

    return wrong


def _not_repeated(right: Callable) -> Callable:
    def wrong(self: Patchify, frames: Any, num_frames: int, height: int, width: int) -> Any:
        # the transform believes that more frames come, and leaves the last patch half written
        patches, grid = right(self, frames, num_frames, height, width)
        if num_frames % self.temporal_patch_size:
            patches.unflatten(-1, (3, self.temporal_patch_size, -1))[:, :, 1:] = 0
        return patches, grid

    return wrong


def _no_transparency(right: Callable) -> Callable:
    return lambda image: image.convert("RGB")


FAULTS: dict[str, Fault] = {
    "resize without antialiasing": patched(_image_transform, "_resize", _no_antialias, "pixels"),
    "resize by Pillow": patched(_image_transform, "resized", _pillow, "pixels"),
    "mean and std swapped": patched(Patchify, "__init__", _mean_and_std_swapped, "pixels"),
    "temporal repeat missing": patched(Patchify, "__call__", _not_repeated, "pixels"),
    "transparency dropped": patched(_image_transform, "_pillow_rgb", _no_transparency, "pixels"),
    "last frame not repeated": patched(Patchify, "__call__", _not_repeated, "video pixels"),
}
