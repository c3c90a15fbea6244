"""What both sides are asked: text, images of several sizes, videos of several rates, turns.

A question is plain data: messages in the form of chat templates, and its media as files.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from parity import photos

SIZES = ((308, 196), (140, 420), (77, 90))  # of images, in pixels
RATES = (
    (2.0, 8),
    (3.0, 10),
    (12.5, 60),
    (25.0, 60),
    (29.0, 60),
)  # of videos: frames a second, frames
LONG = 120  # words


@dataclass(frozen=True)
class Question:
    """One conversation that waits for an answer.

    Attributes:
        name: in a word or two
        messages: turns, their media being `{"type": "image"}` and `{"type": "video"}`
        images: PNG files, in the order in which they are named
        videos: .npy files, uint8 [frames, height, width, 3], each with its frames a second
    """

    name: str
    messages: list[dict[str, Any]]
    images: list[str]
    videos: list[tuple[str, float]]

    def as_json(self) -> dict[str, Any]:
        """The question as a peer's job holds it."""
        return asdict(self)


def write_questions(folder: Path) -> list[Question]:
    """Write the media into a folder, and ask about them."""
    images = [str(_image(folder / f"{index}.png", *size)) for index, size in enumerate(SIZES)]
    return list(_questions(images, folder))


def _questions(images: list[str], folder: Path) -> Iterator[Question]:
    image, video = {"type": "image"}, {"type": "video"}
    yield Question("text", _user(_text("What is a red square?")), [], [])
    long = " ".join(f"word {number}" for number in range(LONG))
    yield Question("a long prompt", _user(_text(long)), [], [])
    for size, path in zip(SIZES, images, strict=True):
        yield Question(
            f"image {size[0]}x{size[1]}", _user(image, _text("What is this?")), [path], []
        )
    yield Question(
        "three images",
        _user(_text("First "), image, _text(", then "), image, image, _text(": which is red?")),
        images,
        [],
    )
    yield Question(
        "several turns",
        [
            {"role": "system", "content": "Be brief."},
            *_user(image, _text("What is this?")),
            {"role": "assistant", "content": "A red square."},
            *_user(image, _text("And this?")),
        ],
        images[:2],
        [],
    )
    for rate, frames in RATES:
        path = str(_video(folder / f"{rate}.npy", frames))
        asked = _user(video, _text("What moves?"))
        yield Question(f"video, {frames} frames at {rate:g} fps", asked, [], [(path, rate)])
    path = str(folder / f"{RATES[0][0]}.npy")
    asked = _user(image, video, _text("Which is larger?"))
    yield Question("image beside video", asked, images[:1], [(path, RATES[0][0])])


def _user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(path: Path, width: int, height: int) -> Path:
    photo = photos.photo(photos.PHOTOS[width % len(photos.PHOTOS)]).convert("RGB")
    photo.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def _video(path: Path, frames: int) -> Path:
    """A photo whose left edge moves, 84 x 56, of sides that need no resizing."""
    photo = photos.photo(photos.PHOTOS[0]).convert("RGB").resize((224, 56))
    steps = [np.asarray(photo.crop((step, 0, step + 84, 56))) for step in range(frames)]
    np.save(path, np.stack(steps))
    return path
