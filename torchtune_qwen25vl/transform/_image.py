"""One image to patches, bit for bit as transformers' default image processor makes them.

The steps are those of its `Qwen2VLImageProcessor`: RGB, antialiased bicubic resize in uint8,
`(value - 255 * mean) / (255 * std)` in float32, patches.

Shapes: c channels, s patch_size, t temporal_patch_size, p patches.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from torchtune_qwen25vl.transform._geometry import (
    PATCH_SIZE,
    PLACEHOLDER_SIDE,
    SPATIAL_MERGE_SIZE,
    TEMPORAL_PATCH_SIZE,
)
from torchtune_qwen25vl.transform._patches import IMAGE_MEAN, IMAGE_STD, Patchify
from torchtune_qwen25vl.transform._pixels import as_pixels, resized_rgbx, size

MAX_RATIO = 200


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = PLACEHOLDER_SIDE,
    min_pixels: int = 3136,
    max_pixels: int = 1003520,
) -> tuple[int, int]:
    """Return the size to resize to: multiples of `factor` within the pixel limits, shape kept.

    Halves round to even: 42 and 70 both become 56. Where the rounded size leaves the limits, both
    sides are scaled by one number and rounded inwards. The result can still miss limits that are
    close to each other, or that would take a side below `factor`.

    Source: `smart_resize` of transformers' image_processing_qwen2_vl.py. For sides shorter than
    half a `factor`, qwen-vl-utils gives another answer.

    Raises:
        ValueError: if not `0 < min_pixels <= max_pixels`, if a side is zero, or if one side is
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


class Qwen25VLImageTransform:
    """One image -> the patches and the grid that the vision encoder takes.

    Equal under `torch.equal` to the default (torchvision) `Qwen2VLImageProcessor` of transformers.
    As there, an EXIF orientation is not applied and greys above 255 are white: the loader in
    `torchtune_qwen25vl.media` sees to both when it reads a file.

    Args:
        min_pixels: pixels under which an image is enlarged; published checkpoints say 3136
        max_pixels: pixels over which an image is shrunk; published checkpoints say 12845056
        patch_size: pixels on each side of a patch
        merge_size: patches on each side of a placeholder
        temporal_patch_size: frames in a patch; an image is repeated to fill them
        image_mean: mean of each channel, where full intensity is 1
        image_std: standard deviation of each channel, where full intensity is 1
        dtype: dtype of the patches; the arithmetic is float32 in any case

    Raises:
        ValueError: if not `0 < min_pixels <= max_pixels`.
    """

    def __init__(
        self,
        *,
        min_pixels: int = 3136,
        max_pixels: int = 1003520,
        patch_size: int = PATCH_SIZE,
        merge_size: int = SPATIAL_MERGE_SIZE,
        temporal_patch_size: int = TEMPORAL_PATCH_SIZE,
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
        """Add the patches of the image under "image": a PIL image, uint8 tensor or uint8 array.

        Returns:
            The sample with "pixel_values" [p, c * t * s * s] and "image_grid_thw", int64 [1, 3].

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
