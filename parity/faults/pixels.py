"""Faults of the image and the video transform, made in what goes in and in what comes out."""

import copy
from collections.abc import Callable
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl import Qwen25VLImageTransform, Qwen25VLVideoTransform
from torchtune_qwen25vl.transform import resized
from torchtune_qwen25vl.transform._patches import IMAGE_MEAN, IMAGE_STD

PATCH_SIZE = 14
IMAGE_LIMITS = 3136, 1003520  # pixels

Resize = Callable[[Tensor, int, int], Tensor]  # uint8 [3, h, w], height, width -> of that size


def _image_fault(make: Callable[[Callable], Callable]) -> Fault:
    return replaced(Qwen25VLImageTransform, make, "pixels", method="__call__")


def _resized_before(resize: Resize) -> Fault:
    """Another resize in place of the transform's, which then finds the size it wants."""

    def make(right: Callable) -> Callable:
        def wrong(self: Any, sample: dict[str, Any]) -> dict[str, Any]:
            image = sample["image"]
            _, rows, columns = right(self, sample)["image_grid_thw"][0].tolist()
            pixels = resized(image, image.height, image.width)  # RGB as it is
            pixels = resize(pixels, PATCH_SIZE * rows, PATCH_SIZE * columns)
            return right(self, {**sample, "image": pixels})

        return wrong

    return _image_fault(make)


def _in_float(antialias: bool) -> Resize:
    def resize(pixels: Tensor, height: int, width: int) -> Tensor:
        larger = interpolate(
            pixels[None].float(), (height, width), mode="bicubic", antialias=antialias
        )
        return larger[0].round().clamp(0, 255).to(torch.uint8)

    return resize


def _by_pillow(pixels: Tensor, height: int, width: int) -> Tensor:
    image = Image.fromarray(numpy.ascontiguousarray(pixels.permute(1, 2, 0)))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _ignore_transparency(right: Callable) -> Callable:
    def wrong(self: Any, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"].convert("RGB")
        image.info.pop("transparency", None)  # of a palette, which Pillow passes on
        return right(self, {**sample, "image": image})

    return wrong


def _of_patches(edit: Callable[[Tensor], Tensor]) -> Fault:
    """A fault in the patches [p, 3 * 2 * 14 * 14] that the transform returns."""

    def make(right: Callable) -> Callable:
        def wrong(self: Any, sample: dict[str, Any]) -> dict[str, Any]:
            sample = right(self, sample)
            return {**sample, "pixel_values": edit(sample["pixel_values"])}

        return wrong

    return _image_fault(make)


def _levels_out_of_256(patches: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    levels = (patches.unflatten(1, (3, -1)) * std + mean) * 255  # [p, channel, value]
    return ((levels / 256 - mean) / std).flatten(1)


def _columns_first(patches: Tensor) -> Tensor:
    return patches.unflatten(0, (-1, 2, 2)).transpose(1, 2).flatten(0, 2)


def _last_frame_once(patches: Tensor) -> Tensor:
    frames = patches.unflatten(1, (3, 2, -1)).clone()  # [p, channel, frame, pixel]
    frames[:, :, 1] = 0
    return frames.flatten(1)


def _other_sampling(right: Callable) -> Callable:
    def wrong(self: Any, **options: Any) -> None:
        right(self, **options | {"sampling": "qwen_vl_utils"})

    return wrong


def _limits_of_images(right: Callable) -> Callable:
    def wrong(self: Any, sample: dict[str, Any]) -> dict[str, Any]:
        other = copy.copy(self)
        other.min_pixels, other.max_pixels = IMAGE_LIMITS
        return right(other, sample)

    return wrong


FAULTS: dict[str, Fault] = {
    "resize without antialiasing": _resized_before(_in_float(antialias=False)),
    "resize in float": _resized_before(_in_float(antialias=True)),
    "resize by Pillow": _resized_before(_by_pillow),
    "transparency ignored": _image_fault(_ignore_transparency),
    "levels out of 256": _of_patches(_levels_out_of_256),
    "columns before rows in a block": _of_patches(_columns_first),
    "second half of a patch empty": _of_patches(_last_frame_once),
    "frames of qwen-vl-utils": replaced(
        Qwen25VLVideoTransform, _other_sampling, "video pixels", method="__init__"
    ),
    "limits of images for videos": replaced(
        Qwen25VLVideoTransform, _limits_of_images, "video pixels", method="__call__"
    ),
}
