"""Sizes of images that are drawn: Qwen's own, and what memory allows.

Bytes were counted in diffusers 0.42.1 by torch's profiler, at two widths and two sizes each: they
grow with the number of tokens, or of pixels, within 3 %.
"""

import math
from dataclasses import dataclass

SIZES = {  # width and height by aspect ratio, as Qwen-Image's README has them
    "1:1": (1328, 1328),
    "16:9": (1664, 928),
    "9:16": (928, 1664),
    "4:3": (1472, 1104),
    "3:4": (1104, 1472),
    "3:2": (1584, 1056),
    "2:3": (1056, 1584),
}
STEP = 16  # pixels of which sides are multiples: a token of the transformer
TRANSFORMER = 16  # activations of a token, each as wide as the transformer
VAE = 45.2  # activations of a pixel, each as wide as the VAE's first layers
TILE = 256 * 256  # pixels that the VAE decodes at once with tiling
LEAST = 256 * 256  # pixels below which nothing is drawn


@dataclass(frozen=True)
class Canvas:
    """How large an image is drawn, and how it is decoded.

    Attributes:
        width: in pixels
        height: likewise
        tiled: whether the VAE decodes it in tiles, whose seams are blended
        reason: what was changed, and why; empty where nothing was
    """

    width: int
    height: int
    tiled: bool = False
    reason: str = ""


def read_size(text: str) -> tuple[int, int]:
    """Return width and height of an aspect ratio, or of WIDTHxHEIGHT.

    Raises:
        ValueError: if it is neither, or a side is no multiple of 16.
    """
    if text in SIZES:
        return SIZES[text]
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size is one of {', '.join(SIZES)}, or WIDTHxHEIGHT, got {text!r}")
    size = int(width), int(height)
    if any(side % STEP or not side for side in size):
        raise ValueError(f"sides are multiples of {STEP} pixels, got {text}")
    return size


@dataclass(frozen=True)
class Memory:
    """What drawing takes of memory.

    Attributes:
        free: bytes left beside the weights
        width: of the transformer
        vae_width: of the VAE's first layers
        itemsize: bytes of a number
        context: tokens beside those of the image: the prompt, and images that are edited
    """

    free: int
    width: int
    vae_width: int
    itemsize: int
    context: int

    def needed(self, pixels: int, *, tiled: bool) -> float:
        """Return the bytes that an image of so many pixels takes at most."""
        tokens = pixels / STEP**2 + self.context
        decoded = min(pixels, TILE) if tiled else pixels
        return self.itemsize * max(
            TRANSFORMER * tokens * self.width, VAE * decoded * self.vae_width
        )

    def fit(self, width: int, height: int) -> Canvas:
        """Fit an image into memory: whole, then decoded in tiles, then smaller.

        Raises:
            ValueError: if not even the smallest fits.
        """
        pixels = width * height
        if self.needed(pixels, tiled=False) <= self.free:
            return Canvas(width, height)
        why = f"{self.free / 1e9:.1f} GB are free beside the weights"
        if self.needed(pixels, tiled=True) <= self.free:
            return Canvas(width, height, True, f"decoded in tiles, as {why}")
        left = self.free / self.itemsize / TRANSFORMER / self.width - self.context
        scale = math.sqrt(max(left, 0) * STEP**2 / pixels)
        small = [int(side * scale) // STEP * STEP for side in (width, height)]
        if small[0] * small[1] < LEAST or self.needed(LEAST, tiled=True) > self.free:
            raise ValueError(f"no image of {width}x{height} can be drawn, not even small: {why}")
        told = f"drawn at {small[0]}x{small[1]} instead of {width}x{height}, as {why}"
        return Canvas(small[0], small[1], True, told)
