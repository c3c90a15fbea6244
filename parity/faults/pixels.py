"""Faults of the image and the video transform."""

from collections.abc import Callable
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl.transform import _patches, _pixels, _video
from torchtune_qwen25vl.transform._patches import Patchify


def _in_float(antialias: bool) -> Callable:
    def resize(pixels: Tensor, height: int, width: int) -> Tensor:
        resized = interpolate(
            pixels[None].float(), (height, width), mode="bicubic", antialias=antialias
        )
        return resized[0].round().clamp(0, 255).to(torch.uint8)

    return lambda right: resize


def _by_pillow(right: Callable) -> Callable:
    def resize(pixels: Tensor, height: int, width: int) -> Tensor:
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(numpy.array(resized)).permute(2, 0, 1)

    return resize


def _transparency_ignored(right: Callable) -> Callable:
    return lambda image: image.convert("RGB")


def _levels_out_of_256(right: Callable) -> Callable:
    return lambda values, frame: right(values * 256 / 255, frame)


def _columns_first(right: Callable) -> Callable:
    def wrong(self: Patchify, frame: Tensor, blocks: Tensor) -> None:
        right(self, frame, blocks.transpose(2, 3))

    return wrong


def _last_frame_once(right: Callable) -> Callable:
    def wrong(self: Patchify, frame: Tensor, blocks: Tensor) -> None:
        right(self, frame, blocks[..., :1, :, :])
        blocks[..., 1:, :, :] = 0

    return wrong


def _other_sampling(right: Callable) -> Callable:
    def wrong(total_frames: int, **options: Any) -> Tensor:
        return right(total_frames, **options | {"sampling": "qwen_vl_utils"})

    return wrong


FAULTS: dict[str, Fault] = {
    "resize without antialiasing": patched(_pixels, "_resize", _in_float(False), "pixels"),
    "resize in float": patched(_pixels, "_resize", _in_float(True), "pixels"),
    "resize by Pillow": patched(_pixels, "_resize", _by_pillow, "pixels"),
    "transparency ignored": patched(_pixels, "_pillow_rgb", _transparency_ignored, "pixels"),
    "levels out of 256": patched(_patches, "_row", _levels_out_of_256, "pixels"),
    "columns before rows in a block": patched(Patchify, "_write", _columns_first, "pixels"),
    "second half of a patch empty": patched(Patchify, "_write", _last_frame_once, "pixels"),
    "frames of qwen-vl-utils": patched(_video, "sample_frames", _other_sampling, "video pixels"),
}
