"""Photo -> patches, bit for bit as transformers' default image processor makes them.

The steps are those of its ``Qwen2VLImageProcessor``: RGB, antialiased bicubic resize in uint8,
``(value - 255 * mean) / (255 * std)`` in float32, patches. Here each step goes strip by strip, so
that neither a second copy of a large photo nor a float copy of the resized one is ever held.
Pixels lie as Pillow keeps them, channels last, in four bytes of which the last is not read: its
memory need not be copied then, and the resize of torch, which works on four, need not unpack it.

Shapes: h w height and width in pixels, c channels (3 once read), s patch_size, m merge_size,
t temporal_patch_size, g_t g_h g_w the grid in patches (`grid_thw`), p = g_t * g_h * g_w patches.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_RATIO = 200
READ_BYTES = 1 << 20  # of an image, read at once
WORK_BYTES = 1 << 20  # of floats, worked on at once: few enough to stay in the cache


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 28,
    min_pixels: int = 3136,
    max_pixels: int = 1003520,
) -> tuple[int, int]:
    """Height and width to resize to: multiples of `factor` within the pixel limits, shape kept.

    Halves round to even: 42 and 70 both become 56. Where the rounded size leaves the limits, both
    sides are scaled by one number and rounded inwards. The result can still miss limits that are
    close to each other, or that would take a side below `factor`.

    Source: `smart_resize` of transformers' image_processing_qwen2_vl.py. For sides shorter than
    half a `factor`, qwen-vl-utils gives another answer.

    Raises:
        ValueError: if not ``0 < min_pixels <= max_pixels``, if a side is zero, or if one side is
            more than 200 times the other.
    """
    if not 0 < min_pixels <= max_pixels:
        raise ValueError(
            f"pixel limits must be 0 < min_pixels <= max_pixels, got min_pixels={min_pixels} and "
            f"max_pixels={max_pixels}; are they swapped?"
        )
    if height < 1 or width < 1:
        raise ValueError(
            f"an image needs a pixel on each side, got {height} x {width}; drop empty images"
        )
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise ValueError(
            f"one side may be at most {MAX_RATIO} times the other, got {height} x {width}; "
            "cut the image into pieces"
        )
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * stretch / factor) * factor
        new_width = math.ceil(width * stretch / factor) * factor
    return new_height, new_width


def as_pixels(image: Any, *, channels: Sequence[int] = (1, 3, 4)) -> Image.Image | Tensor:
    """The image as PIL image, or as uint8 view [c, h, w] of the tensor or array.

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
            "; files are read by the loader in torchtune_qwen25vl.data"
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
    """Height and width in pixels."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return image.shape[1], image.shape[2]


def resized(image: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """The image as RGB of this size, uint8 [3, height, width]."""
    return resized_rgbx(image, height, width)[:3]


def resized_rgbx(image: Image.Image | Tensor, height: int, width: int) -> Tensor:
    """The image as RGB of this size, uint8 [3 or 4, height, width]; a fourth channel is unused.

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
        for rows in _strips(h, READ_BYTES // (4 * w)):
            pixels[:, rows] = _resize(_rgbx(image, rows), rows.stop - rows.start, width)
    return _resize(pixels, height, width)


def _is_ready(image: Tensor, height: int, width: int) -> bool:
    """Whether this is RGB that lies as the resize likes it, or needs none."""
    return len(image) == 3 and (image.stride(0) == 1 or size(image) == (height, width))


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    return tvf.resize(
        pixels, [height, width], interpolation=tvf.InterpolationMode.BICUBIC, antialias=True
    )


def _strips(length: int, step: int) -> Iterator[slice]:
    step = max(step, 1)
    return (slice(k, min(k + step, length)) for k in range(0, length, step))


def _rgbx(image: Image.Image | Tensor, rows: slice) -> Tensor:
    """These rows as RGB with transparency laid on white, uint8 [4, r, w], channels last."""
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
    """The memory of an RGB image, uint8 [4, h, w]; a copy where Pillow keeps it in pieces."""
    try:
        flat = torch.from_dlpack(pyarrow.array(image).flatten())
    except ValueError:  # so Pillow says that the rows do not follow each other
        flat = torch.from_numpy(np.array(image.convert("RGBX")))
    return flat.view(image.height, image.width, 4).permute(2, 0, 1)


class Patchify:
    """Frames of one size -> normalised patches in block order.

    The `merge_size` x `merge_size` patches that become one placeholder are neighbours; a patch
    holds its values as [c, t, s, s]. The last frame is repeated where `temporal_patch_size` asks
    for more frames: an image fills both halves of its patches.

    Args:
        patch_size: pixels on each side of a patch.
        merge_size: patches on each side of a placeholder.
        temporal_patch_size: frames in a patch.
        image_mean: of each channel, where full intensity is 1.
        image_std: of each channel, where full intensity is 1.
        dtype: of the patches; the arithmetic is float32 in any case.
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
        """Pixels on each side of a placeholder."""
        return self.patch_size * self.merge_size

    def __call__(
        self, frames: Iterable[Tensor], num_frames: int, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Of uint8 frames [3 or 4, h, w]: patches [p, 3 * t * s * s] and `grid_thw`, int64 [1, 3].

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
        """Writes a frame [3 or 4, h, w] into [g_h / m, g_w / m, m, m, 3, t, s, s], t times over."""
        s, m = self.patch_size, self.merge_size
        mean, std = _row(self.mean, frame), _row(self.std, frame)
        for rows in _strips(len(blocks), WORK_BYTES // (4 * frame[:, : s * m].numel())):
            strip = frame[:, rows.start * s * m : rows.stop * s * m]
            values = _in_blocks(strip.to(torch.float32).sub_(mean).div_(std)[:3], m, s)
            blocks[rows] = values.unsqueeze(-3)
            del values  # before the next ones are made


def _in_blocks(strip: Tensor, m: int, s: int) -> Tensor:
    """A strip [3, h, w] as [h / (m * s), w / (m * s), m, m, 3, s, s], contiguous."""
    parts = strip.unflatten(2, (-1, m, s)).unflatten(1, (-1, m, s))
    return parts.permute(1, 4, 2, 5, 0, 3, 6).contiguous()


def _row(values: Tensor, frame: Tensor) -> Tensor:
    """A value per channel as a row [3 or 4, 1, w], in the memory order in which the frame lies."""
    row = torch.ones_like(frame[:, :1], dtype=torch.float32)
    row[:3] = values
    return row


class Qwen25VLImageTransform:
    """One image -> the patches and the grid that the vision encoder takes.

    Equal under `torch.equal` to the default (torchvision) `Qwen2VLImageProcessor` of transformers.
    As there, an EXIF orientation is not applied and greys above 255 are white: the loader in
    `torchtune_qwen25vl.data` sees to both when it reads a file.

    Args:
        min_pixels: images of fewer pixels are enlarged; published checkpoints say 3136.
        max_pixels: images of more pixels are shrunk; published checkpoints say 12845056.
        patch_size: pixels on each side of a patch.
        merge_size: patches on each side of a placeholder.
        temporal_patch_size: frames in a patch; an image is repeated to fill them.
        image_mean: of each channel, where full intensity is 1.
        image_std: of each channel, where full intensity is 1.
        dtype: of the patches; the arithmetic is float32 in any case.

    Raises:
        ValueError: if not ``0 < min_pixels <= max_pixels``.
    """

    def __init__(
        self,
        *,
        min_pixels: int = 3136,
        max_pixels: int = 1003520,
        patch_size: int = 14,
        merge_size: int = 2,
        temporal_patch_size: int = 2,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.patchify = Patchify(
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=temporal_patch_size,
            image_mean=image_mean,
            image_std=image_std,
            dtype=dtype,
        )
        self.limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        smart_resize(1, 1, **self.limits)  # refuses bad limits now

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Adds the patches of the image under "image": a PIL image, uint8 tensor or uint8 array.

        Returns:
            the sample with "pixel_values" [p, c * t * s * s] and "image_grid_thw", int64 [1, 3].

        Raises:
            ValueError: if it is no image that can be read (`as_pixels`) or has no size that can be
                resized (`smart_resize`).
        """
        image = as_pixels(sample["image"])
        height, width = smart_resize(*size(image), factor=self.patchify.factor, **self.limits)
        return {**sample, **self._patches(image, height, width)}

    def of_resized(self, image: Any) -> dict[str, Any]:
        """Make patches of an image that is resized already; the pixel limits do not apply to it.

        Args:
            image: a PIL image, uint8 tensor or uint8 array, both sides multiples of 28

        Returns:
            "pixel_values" [p, c * t * s * s] and "image_grid_thw", int64 [1, 3].

        Raises:
            ValueError: if it is no image that can be read (`as_pixels`), or a side is no multiple.
        """
        image, factor = as_pixels(image), self.patchify.factor
        height, width = size(image)
        if height % factor or width % factor or not height * width:
            raise ValueError(
                f"an image that is resized already has sides that are multiples of {factor}, got "
                f"{height} x {width}; resize it to what smart_resize says, or do not mark it"
            )
        return self._patches(image, height, width)

    def _patches(self, image: Image.Image | Tensor, height: int, width: int) -> dict[str, Any]:
        frame = resized_rgbx(image, height, width)
        pixel_values, grid_thw = self.patchify([frame], 1, height, width)
        return {"pixel_values": pixel_values, "image_grid_thw": grid_thw}
