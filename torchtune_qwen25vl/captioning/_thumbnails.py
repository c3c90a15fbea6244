"""Small images for the review page, made when an image is read for the model.

Each lies in a file whose name says of which image it is, in which state of its file: an image that
has changed gets a new one. They are a help only; one that is missing is made for the page.

Shapes: h w height and width in pixels.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from torchtune_qwen25vl.captioning._records import stamp_of
from torchtune_qwen25vl.jobs import Item, Workers, jpeg_of, read_pixels, read_task
from torchtune_qwen25vl.media import THUMBNAILS, load_image


class Thumbnails:
    """The thumbnails of a run.

    Args:
        folder: output folder of the run
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / THUMBNAILS

    def path(self, item: Item) -> Path:
        """Return where the thumbnail of an image lies, or will."""
        file = item.path or Path(item.name.rpartition("#")[0])
        state = f"{item.name} {stamp_of(file)}".encode("utf-8", "surrogateescape")
        return self._folder / f"{hashlib.sha256(state).hexdigest()[:32]}.jpg"

    def read(self, items: Sequence[Item], workers: Workers) -> Iterator[bytes]:
        """Yield the JPEG of each image, made now where it is missing; of no image, nothing.

        Args:
            items: images
            workers: read those whose thumbnails are missing
        """
        paths = list(map(self.path, items))
        missing = [(item, path) for item, path in zip(items, paths, strict=True) if not _read(path)]
        tasks = (read_task(make_thumbnail, item, path) for item, path in missing)
        for _ in workers.map(tasks, ahead=64):
            pass
        yield from map(_read, paths)

    def keep(self, items: Iterable[Item]) -> None:
        """Remove the thumbnails of all other images."""
        kept = {self.path(item).name for item in items}
        for path in self._folder.glob("*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def read_for_model(
    source: Any, min_pixels: int, max_pixels: int, thumbnail: Path | None
) -> np.ndarray:
    """Read an image as the model will see it, uint8 [h, w, 3], and make its thumbnail beside.

    Args:
        source: of `load_image`
        min_pixels: the image is enlarged to so many
        max_pixels: the image is shrunk to so many
        thumbnail: file of the thumbnail, if there is to be one
    """
    image = load_image(source)
    pixels = read_pixels(image, min_pixels, max_pixels)
    if thumbnail is not None and not _read(thumbnail):
        with suppress(OSError):  # a full disk stops the run elsewhere
            _write(image, thumbnail)
    return pixels


def make_thumbnail(source: Any, path: Path) -> None:
    """Read an image for its thumbnail alone."""
    _write(load_image(source), path)


def _write(image: Image.Image, path: Path) -> None:
    """Write a thumbnail whole or not at all; it is not waited for until it is on disk."""
    content = jpeg_of(image)
    path.parent.mkdir(exist_ok=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    hidden.write_bytes(content)
    os.replace(hidden, path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
