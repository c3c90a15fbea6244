"""What `_pixels` and `_patches` compute, a whole image at a time: to read, and to hold them to.

Nothing of the package calls it: it takes 6.7 times the memory of its result, where the strips take
1.3 to 2.0 times, and is 1.5 to 3.1 times slower. A test holds both to the same bits.

Shapes: c channels, h w height and width in pixels, g_h g_w the grid in patches, s patch_size,
m merge_size, t temporal_patch_size.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from torchtune_qwen25vl.transform._geometry import (
    PATCH_SIZE,
    SPATIAL_MERGE_SIZE,
    TEMPORAL_PATCH_SIZE,
)


def straight_patches(
    image: Image.Image | Tensor,
    height: int,
    width: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> Tensor:
    """Resize an image, or uint8 [c, h, w], and cut it into normalised patches."""
    s, m, t = PATCH_SIZE, SPATIAL_MERGE_SIZE, TEMPORAL_PATCH_SIZE
    bicubic = tvf.InterpolationMode.BICUBIC
    resized = tvf.resize(_rgb(image), [height, width], interpolation=bicubic, antialias=True)
    mean_and_std = 255 * torch.tensor([image_mean, image_std], dtype=torch.float32)
    mean, std = mean_and_std.view(2, 3, 1, 1)  # [3, 1, 1]
    values = (resized.float() - mean) / std  # [3, height, width]
    blocks = values.unflatten(2, (-1, m, s)).unflatten(1, (-1, m, s))
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # [g_h / m, g_w / m, m, m, 3, s, s]
    frames = blocks.unsqueeze(-3).expand(*blocks.shape[:5], t, s, s)
    return frames.reshape(-1, 3 * t * s * s)


def _rgb(image: Image.Image | Tensor) -> Tensor:
    """Return the image as RGB with transparency laid on white, uint8 [3, h, w]."""
    if isinstance(image, Image.Image):
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if len(image) == 4:
        rgba = tvf.to_dtype(image, torch.float32, scale=True)
        rgb = rgba[:3] * rgba[3:] + (1 - rgba[3:])
        return tvf.to_dtype(rgb, torch.uint8, scale=True)
    return image.expand(3, -1, -1)
