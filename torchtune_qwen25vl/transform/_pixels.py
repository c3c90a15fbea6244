"""Images of any kind to uint8 RGB of the wanted size, read and resized strip by strip.

A second copy of a large image is never held: `resized_rgbx` reads a strip of rows, resizes it
horizontally, and goes on; the vertical resize comes last. `_straight.py` says the same in a few
lines, and a test holds both to the same bits. Pixels lie as Pillow keeps them, channels last, in
four bytes of which the last is not read: its memory need not be copied then, and the resize of
torch, which works on four, need not unpack it.

Shapes: c channels (3 once read), h w height and width in pixels, r rows of a strip.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

READ_BYTES = 1 << 20  # of an image, read at once


def as_pixels(image: Any, *, channels: Sequence[int] = (1, 3, 4)) -> Image.Image | Tensor:
    """Return the image as PIL image, or as uint8 view [c, h, w] of the tensor or array.

    The channel axis is the first one if its length is one of `channels`, else the last one
    (`infer_channel_dimension_format` of transformers).

    Raises:
        ValueError: if it is no image, not uint8, not three-dimensional, or of other `channels`.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, Tensor | np.ndarray):
        raise ValueError(
            f"an image is a PIL image, a uint8 tensor or a uint8 array, got {type(image).__name__}"
            "; files are read by the loader in torchtune_qwen25vl.media"
        )
    if image.dtype != (torch.uint8 if isinstance(image, Tensor) else np.uint8):
        raise ValueError(
            f"image tensors and arrays hold uint8 from 0 to 255, got {image.dtype}; values from 0 "
            "to 1 become that by times 255, round, clip and cast"
        )
    if image.ndim != 3:
        raise ValueError(
            f"an image has the shape [c, h, w] or [h, w, c], got {list(image.shape)}; pass one "
            "image at a time, with its channel axis"
        )
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.require(image, requirements="W"))
    if image.shape[0] in channels:
        return image.cpu()  # [c, h, w]
    if image.shape[2] in channels:
        return image.cpu().permute(2, 0, 1)  # [c, h, w]
    raise ValueError(
        f"the first or last axis of an image counts its channels, one of {list(channels)}, got "
        f"{list(image.shape)}; convert the image to RGB"
    )


def size(image: Image.Image | Tensor) -> tuple[int, int]:
    """Return height and width in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[1], image.shape[2]


def resized(image: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """Resize an image to RGB of this size, uint8 [3, height, width]."""
    return resized_rgbx(image, height, width)[:3]


def resized_rgbx(image: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """Resize an image to RGB of this size, uint8 [3 or 4, height, width], the fourth unused.

    The uint8 resize of torch rounds to uint8 between its horizontal and its vertical pass, so that
    the passes can be run apart: the horizontal one strip by strip while the image is being read.
    """
    h, w = size(image)
    if isinstance(image, Image.Image) and image.mode == "LAB":
        image = image.convert("RGB")  # Pillow prepares for as long as it then converts a strip
    if isinstance(image, Tensor) and _is_ready(image, height, width):
        pixels = image
    elif 4 * h * w <= 4 * READ_BYTES:  # a few strips would cost more than they save
        pixels = _rgbx(image, slice(0, h))
    else:
        pixels = torch.empty(h, width, 4, dtype=torch.uint8).permute(2, 0, 1)  # [4, h, width]
        for rows in strips(h, READ_BYTES // (4 * w)):
            pixels[:, rows] = _resize(_rgbx(image, rows), rows.stop - rows.start, width)
    return _resize(pixels, height, width)


def _is_ready(image: Tensor, height: int, width: int) -> bool:
    """Return whether this is RGB that lies as the resize likes it, or needs none."""
    return len(image) == 3 and (image.stride(0) == 1 or size(image) == (height, width))


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    return tvf.resize(
        pixels, [height, width], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True
    )


def strips(length: int, step: int) -> Iterator[slice]:
    """Cut `length` rows into slices of `step` rows, of at least one."""
    step = max(step, 1)
    return (slice(k, min(k + step, length)) for k in range(0, length, step))


def _rgbx(image: Image.Image | Tensor, rows: slice) -> Tensor:
    """Return these rows as RGB, transparency laid on white, uint8 [4, r, w], channels last."""
    if isinstance(image, Image.Image):
        return _memory(_pillow_rgb(image.crop((0, rows.start, image.width, rows.stop))))
    pixels = image[:, rows]  # [c, r, w]
    if len(pixels) == 4:
        rgba = tvf.to_dtype(pixels.contiguous(), torch.float32, scale=True)
        rgb = rgba[:3].mul_(rgba[3:]).add_(1 - rgba[3:])
        pixels = tvf.to_dtype(rgb, torch.uint8, scale=True)
    red, green, blue = pixels.expand(3, -1, -1).to(torch.int32)  # [r, w] each
    packed = red.add_(green, alpha=1 << 8).add_(blue, alpha=1 << 16)
    return packed.unsqueeze(-1).view(torch.uint8).permute(2, 0, 1)


def _pillow_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _memory(image: Image.Image) -> Tensor:
    """Return the memory of an RGB image, uint8 [4, h, w], or a copy of its pieces."""
    try:
        flat = torch.from_dlpack(pyarrow.array(image).flatten())
    except ValueError:  # so Pillow says that the rows do not follow each other
        flat = torch.from_numpy(np.array(image.convert("RGBX")))
    return flat.view(image.height, image.width, 4).permute(2, 0, 1)
