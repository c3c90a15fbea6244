"""Images as worker processes read them: their size, and their resized pixels.

Shapes: h w height and width in pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from torchtune_qwen25vl.jobs._items import Item
from torchtune_qwen25vl.jobs._workers import Outcome, Task, Workers
from torchtune_qwen25vl.media import image_size, load_image
from torchtune_qwen25vl.transform import PLACEHOLDER_PIXELS, resized, smart_resize


def read_task(function: Callable[..., Any], item: Item, *arguments: Any) -> Task:
    """Make a task that calls a function with an item's image; a table's row is read here."""
    try:
        return Task(function, (item.read(), *arguments))
    except ValueError as error:
        return Task(_refuse, (str(error),))


def _refuse(problem: str) -> None:
    raise ValueError(problem)


def count_tokens(
    items: Sequence[Item], workers: Workers, min_pixels: int, max_pixels: int
) -> dict[str, Outcome]:
    """Count the placeholders of all images, by the headers of their files, behind a progress bar.

    Returns:
        For each name the number of placeholders, or why its header cannot be read.
    """
    tasks = (read_task(tokens_of, item, min_pixels, max_pixels) for item in items)
    counts = workers.map(tasks, ahead=256)
    bar = tqdm(counts, "reading headers", len(items), unit="image", leave=False)
    return {item.name: count for item, count in zip(items, bar, strict=True)}


def tokens_of(source: Any, min_pixels: int, max_pixels: int) -> int:
    """Count the placeholders that an image becomes, from the header of its file alone."""
    width, height = image_size(source)
    height, width = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels)
    return height * width // PLACEHOLDER_PIXELS


def read_pixels(source: Any, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Read an image as the model will see it, uint8 [h, w, 3], both sides multiples of 28.

    This is the slow half of what `Qwen25VLTransform` does with the file itself; the other half
    leaves the size as it is.
    """
    image = load_image(source)
    height, width = smart_resize(
        image.height, image.width, min_pixels=min_pixels, max_pixels=max_pixels
    )
    pixels = resized(image, height, width).permute(1, 2, 0)  # [h, w, 3]
    return np.ascontiguousarray(pixels.numpy())
