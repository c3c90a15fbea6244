"""Images as ComfyUI and as PIL have them, and as a VAE encodes them.

Shapes: b images, h w height and width in pixels.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchtune_qwen25vl.conditioning import sized

AREA = 1024 * 1024  # pixels of a reference image


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return the images of an IMAGE [b, h, w, 3 or 4], 0 to 1; a fourth channel is left out.

    Raises:
        ValueError: if it has another shape.
    """
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise ValueError(
            "an IMAGE is [batch, height, width, 3 or 4], got "
            f"{list(images.shape)}: connect the output of a node that loads or makes images"
        )
    pixels = (images[..., :3].clamp(0, 1) * 255).round().to(torch.uint8)  # [b, h, w, 3]
    return [Image.fromarray(image) for image in pixels.cpu().numpy()]


def all_images(batches: Iterable[Tensor | None]) -> list[Image.Image]:
    """Return the images of several inputs of a node, in their order; None is an empty one."""
    return [image for batch in batches if batch is not None for image in to_pil(batch)]


def reference_latent(vae: Any, image: Image.Image, *, resize: bool) -> Tensor:
    """Encode an image that is to be edited.

    Args:
        vae: of ComfyUI
        image: at any size
        resize: bring it to 1024 * 1024 pixels of its own shape first, as diffusers' pipelines do;
            the VAE itself cuts what is no multiple of its own step
    """
    if resize:
        image = image.resize(sized(*image.size, AREA), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).float() / 255  # [h, w, 3]
    return vae.encode(pixels[None])
