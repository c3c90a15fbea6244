"""The harness's real input: photos bundled with scikit-image, and generated hard cases."""

import functools
from pathlib import Path

import numpy
from PIL import Image

PHOTOS = (
    "astronaut.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "logo.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)


@functools.cache
def photo(name: str) -> Image.Image:
    """One bundled photo, as it is stored: RGB, RGBA or grey, 191 to 1411 pixels a side."""
    import skimage

    image = Image.open(Path(skimage.__file__).parent / "data" / name)
    image.load()
    return image


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """White noise: the image on which one wrong tap of the resize shows most."""
    shape = (height, width, 4)
    values = numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)
    return Image.fromarray(values, "RGBA").convert("RGB").convert(mode)


def gradient(width: int, height: int) -> Image.Image:
    """A smooth ramp with one axis per channel: swapped axes or channels show at once."""
    x = numpy.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = numpy.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(numpy.stack([x, y, 255 - x], -1).astype(numpy.uint8))


def translucent(width: int, height: int) -> Image.Image:
    """Noise under an alpha ramp."""
    image = noise(width, height).convert("RGBA")
    ramp = numpy.linspace(0, 255, width)[None, :].repeat(height, 0).astype(numpy.uint8)
    image.putalpha(Image.fromarray(ramp))
    return image


def palette_with_transparency(width: int, height: int) -> Image.Image:
    """A palette image of which one index is transparent, as a PNG with a tRNS chunk is read."""
    image = noise(width, height).quantize(16)
    image.info["transparency"] = 3
    return image


def sixteen_bit(width: int, height: int) -> Image.Image:
    """16-bit grey, most of it above 255."""
    values = numpy.random.default_rng(0).integers(0, 65536, (height, width), dtype=numpy.uint16)
    return Image.fromarray(values)


def hard_cases() -> dict[str, Image.Image]:
    """Return images that each break some shortcut."""
    return {
        "1 x 1": noise(1, 1),
        "13 x 300": noise(13, 300),
        "ratio 200": noise(1400, 7),
        "tie in rounding 42 x 70": noise(42, 70),
        "on the grid 280 x 392": noise(280, 392),
        "640 x 480 noise": noise(640, 480),
        "37 x 3000 noise": noise(37, 3000),
        "axes and channels": gradient(501, 203),
        "RGBA": translucent(333, 217),
        "palette with transparency": palette_with_transparency(150, 111),
        "16-bit grey": sixteen_bit(120, 90),
        "CMYK": noise(97, 131, "CMYK"),
        "one bit": noise(203, 71, "1"),
        "grey": noise(155, 29, "L"),
    }
