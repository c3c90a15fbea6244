"""Image files to the RGB image a person sees, or an error that names the file.

The image transform takes images as they are; turning a *file* into one is done here, once, for
training and captioning alike: EXIF orientation is applied, transparency lies on white, 16-bit greys
are scaled to 8 bits, and what is cut short, oversized or no image is refused.
"""

import importlib
import warnings
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from torchtune_qwen25vl.media._sources import locate

_BY_PLUGIN = {"heic": ("pillow_heif", ".heic .heif .hif"), "jxl": ("pillow_jxl", ".jxl")}

LACKING = {
    suffix: extra
    for extra, (plugin, suffixes) in _BY_PLUGIN.items()
    for suffix in suffixes.split()
    if find_spec(plugin) is None
}
"""Suffixes of images that cannot be read here, each with the extra that is not installed."""

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tga", ".tif", ".tiff", ".webp"),
    *(s for _, suffixes in _BY_PLUGIN.values() for s in suffixes.split() if s not in LACKING),
)
"""Suffixes of files that are images."""

PIXEL_LIMIT = 178_956_970
"""Pixels of the largest image that is decoded: where Pillow itself refuses; 0.5 GB of RGB."""


def load_image(
    source: Any, *, root: Path | None = None, pixel_limit: int = PIXEL_LIMIT
) -> Image.Image:
    """Decode one image, whatever holds it, upright, opaque and RGB.

    Of animations the first frame is taken. LOAD_TRUNCATED_IMAGES is never switched on.

    Args:
        source: a PIL image, a path, a `file://` or `data:` URL, bytes, or the
            `{"bytes", "path"}` mapping that `datasets` stores
        root: folder that relative paths start from; None allows absolute paths only
        pixel_limit: width * height above which a file is refused before it is decoded. Above
            Pillow's own limit raise `PIL.Image.MAX_IMAGE_PIXELS` as well

    Raises:
        ValueError: naming the file, if it is missing, empty, no image, damaged, cut short, larger
            than `pixel_limit`, of a pixel type without a defined white, or a remote URL.
    """
    if isinstance(source, Image.Image):
        return _decode(f"PIL image {getattr(source, 'filename', '')}".strip(), source, pixel_limit)
    name, file = locate(source, root)
    with _open(name, file) as image:
        return _decode(name, image, pixel_limit)


def image_size(source: Any) -> tuple[int, int]:
    """Return width and height by the header of an image, which is not decoded.

    Args:
        source: a path, a `file://` or `data:` URL, bytes, or the mapping that `datasets` stores

    Raises:
        ValueError: naming the file, if its header is no image's.
    """
    with _open(*locate(source)) as image:
        return image.size


def is_image(path: Path) -> bool:
    """Say whether a file is an image by what it holds, whatever it is called."""
    try:
        image_size(path)
    except ValueError:
        return False
    return True


def _as_seen(image: Image.Image) -> Image.Image:
    """Return what a viewer shows: upright, 8 bits a channel, transparency on white, RGB.

    16-bit greys (modes I;16 and I) are scaled by 255 / 65535, so that one value is one grey in
    every file; Pillow's own conversion clips everything above 255 to white.

    Raises:
        ValueError: if the pixels are floats or 32-bit integers beyond 16 bits: nothing says which
            value is white.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("float pixels have no defined white; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scale_to_8_bit(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _open(name: str, file: Path | bytes) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, so a cut file would load as a "
            "half-grey image; switch it off"
        )
    _register_plugins()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pixel_limit decides
            return Image.open(BytesIO(file) if isinstance(file, bytes) else file)
    except UnidentifiedImageError as error:
        if extra := LACKING.get(Path(name).suffix.lower()):
            raise ValueError(
                f"{name}: images of this kind need the extra {extra}: install "
                f"torchtune-qwen25vl[{extra}]"
            ) from error
        raise ValueError(f"{name}: not an image, or of a format Pillow cannot read") from error
    except Exception as error:  # Pillow's plugins raise a dozen kinds on damaged headers
        raise ValueError(f"{name}: cannot be opened as an image ({error})") from error


@cache
def _register_plugins() -> None:
    """Teach Pillow the formats whose plugin is installed."""
    for plugin in (plugin for plugin, _ in _BY_PLUGIN.values() if find_spec(plugin)):
        module = importlib.import_module(plugin)
        if hasattr(module, "register_heif_opener"):
            module.register_heif_opener()  # the other registers itself


def _decode(name: str, image: Image.Image, pixel_limit: int) -> Image.Image:
    if image.width * image.height > pixel_limit:
        raise ValueError(
            f"{name}: {image.width}x{image.height} is more than pixel_limit={pixel_limit} pixels; "
            "shrink the file or raise the limit"
        )
    try:
        image.load()
        return _as_seen(image)
    except Exception as error:  # and a dozen more on damaged bodies
        raise ValueError(f"{name}: cannot be decoded ({error})") from error


def _scale_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # [h, w]
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"32-bit pixels from {values.min()} to {values.max()} have no defined white; "
            "save it with 8 or 16 bits a channel"
        )
    grey = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
