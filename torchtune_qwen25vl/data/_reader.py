"""A row of any format to the messages that Qwen25VLTransform takes, media decoded."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from torchtune_qwen25vl.data._boxes import Size, move_boxes, name_objects
from torchtune_qwen25vl.data._conversation import Conversation, Turn, to_messages
from torchtune_qwen25vl.data._frames import SAMPLING, kept_frames, resampled_rate
from torchtune_qwen25vl.data._options import Options
from torchtune_qwen25vl.data._places import OF_ROW, fill_places
from torchtune_qwen25vl.data._weights import OF_TURNS, weights_of_answers
from torchtune_qwen25vl.media import frames_in, load_image, load_video, url_of
from torchtune_qwen25vl.transform import resized, smart_resize

LIMITS = ("min_pixels", "max_pixels")


@dataclass(frozen=True)
class Reader:
    """The reader of rows, called in dataloader workers: it parses, decodes, moves boxes, checks.

    Attributes:
        parse: parser of the format, from a row to a conversation
        limits: "min_pixels" and "max_pixels" of the image transform
        sampling: sampling of the video transform
        may_shrink: whether the transform may resize images further to make a sample fit
        root: folder that relative paths start from
        options: options of the user
    """

    parse: Callable[[dict[str, Any]], Conversation]
    limits: Mapping[str, int]
    sampling: Mapping[str, Any]
    may_shrink: bool
    root: Path | None
    options: Options

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Make {"messages": [Message, ...]} of a row, and "tools" where it has some.

        Raises:
            ValueError: for whatever is wrong with the row.
        """
        try:
            return self._read(dict(row))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the row is not laid out as its format says: {error!r}") from error

    def prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Make of a row what `__call__` makes, without its last answer, which is the "reference".

        A row that ends with a question has no reference.

        Raises:
            ValueError: for whatever is wrong with the row.
        """
        asks = self.parse(dict(row)).turns[-1].role != "assistant"
        parse = partial(_answered, self.parse) if asks else self.parse
        read = replace(self, parse=parse)(row)
        *before, last = read["messages"]
        return {**read, "messages": before, "reference": None if asks else last.text_content}

    def answers(self, row: Mapping[str, Any]) -> list[str]:
        """Return the texts of a row's answers, as they are written there."""
        answers = [turn for turn in self._turns(dict(row)) if turn.role == "assistant"]
        return [part["content"] for part in _parts(answers, "text")]

    def image(self, source: Any) -> Image:
        """Decode an image of a row, downloaded where that is allowed.

        Raises:
            ValueError: naming the file, or the URL.
        """
        here = self._here(source)
        try:
            return load_image(here, root=self.root, pixel_limit=self.options.pixel_limit)
        except ValueError as error:
            if here is source:
                raise
            raise ValueError(f"{url_of(source)}: {error}; remove it to download again") from error

    def _here(self, source: Any) -> Any:
        """Return a source, or the file that its URL was downloaded to."""
        if (url := url_of(source)) is None:
            return source
        if not self.options.allow_download:
            raise ValueError(
                f"{url}: URLs are not fetched while training; download the file first, or set "
                "allow_download=True in the section of the data set"
            )
        return self.options.downloads.fetch(url)

    def _turns(self, row: dict[str, Any]) -> list[Turn]:
        return self.parse(row).turns

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        conversation = self.parse(row)
        weights = weights_of_answers(conversation.turns, row)
        return self._sample(conversation) | ({OF_TURNS: weights} if weights else {})

    def _sample(self, conversation: Conversation) -> dict[str, Any]:
        turns = fill_places(conversation, prepend_media=self.options.prepend_media)
        turns = _mapped(turns, self._load)
        turns = self._boxed(turns, conversation.objects)
        sample: dict[str, Any] = {"messages": to_messages(_mapped(turns, self._limited))}
        if conversation.tools:
            sample["tools"] = conversation.tools
        return sample

    def _load(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {**part, "content": self.image(part["content"])}
        if part["type"] == "video":
            return self._video(part)
        return part

    def _video(self, part: dict[str, Any]) -> dict[str, Any]:
        if isinstance(part["content"], list):
            return self._frames(part, part["content"])
        if (frames := frames_in(part["content"], self.root)) is not None:
            return self._frames(part, frames)
        if part.get(OF_ROW) is not None:
            raise ValueError(
                f"fps of a row, {part[OF_ROW]!r}, is the rate of a video that is given as frames, "
                "but this one is a file, which says its own; leave it out, or set video.fps of the "
                "tokenizer to keep so many frames of a second"
            )
        own = {name: part[name] for name in SAMPLING if name in part}
        rate = {"fps": None, "num_frames": None} if "fps" in own or "num_frames" in own else {}
        keep = partial(kept_frames, sampling={**self.sampling, **rate, **own})
        source = self._here(part["content"])
        kept, fps = load_video(source, keep=keep, root=self.root)
        fps = resampled_rate(len(kept), fps, self.sampling)
        return {"type": "video", "content": kept, "fps": fps}

    def _frames(self, part: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
        """Read a video that is a list of images; its `fps` is the rate at which these pass."""
        if others := sorted(part.keys() & set(SAMPLING) - {"fps"}):
            raise ValueError(
                f"of a video given as a list of images fps is heeded, the rate of these, but not "
                f"{', '.join(others)}; list the images to keep"
            )
        frames = [self.image(image) for image in images]
        rates = (part.get("fps"), part.get(OF_ROW), self.options.fps)
        fps = next((rate for rate in rates if rate is not None), None)
        if fps is not None and (type(fps) not in (int, float) or not 0 < fps < math.inf):
            raise ValueError(f"fps is a number above 0, got {fps!r}")
        return {"type": "video", "content": frames} | ({} if fps is None else {"fps": fps})

    def _boxed(self, turns: list[Turn], objects: Mapping[str, Any] | None) -> list[Turn]:
        """Move the boxes in the texts of the turns to resized pixels."""
        if not objects and self.options.boxes == "resized":
            return turns
        sizes = [
            ((part["content"].height, part["content"].width), self._resized_size(part))
            for part in _parts(turns, "image")
        ]
        texts = [part["content"] for part in _parts(turns, "text")]
        moved = name_objects(texts, objects, sizes) if objects else move_boxes(texts, sizes)
        if self.may_shrink and moved != texts:
            raise ValueError(
                "boxes are moved to the size that max_pixels gives, but over_long='shrink_images' "
                "may shrink the image further; choose another over_long for rows with boxes"
            )
        rest = iter(moved)
        return _mapped(
            turns, lambda part: {**part, "content": next(rest)} if part["type"] == "text" else part
        )

    def _resized_size(self, part: Mapping[str, Any]) -> Size:
        own = {name: part[name] for name in LIMITS if name in part}
        image = part["content"]
        return smart_resize(image.height, image.width, **{**self.limits, **own})

    def _limited(self, part: dict[str, Any]) -> dict[str, Any]:
        """Resize an image with limits of its own (Qwen's "min_pixels", "max_pixels") to them.

        The transform takes it as it is: the row's limits go before the tokenizer's.
        """
        if part["type"] != "image" or not any(name in part for name in LIMITS):
            return part
        pixels = resized(part["content"], *self._resized_size(part))
        return {"type": "image", "content": pixels, "resized": True}


def _answered(parse: Callable[[dict[str, Any]], Conversation], row: dict[str, Any]) -> Conversation:
    """Parse a row that ends with a question, and answer it."""
    conversation = parse(row)
    answer = Turn("assistant", [{"type": "text", "content": "."}])
    return replace(conversation, turns=[*conversation.turns, answer])


def _parts(turns: list[Turn], kind: str) -> list[dict[str, Any]]:
    return [part for turn in turns for part in turn.parts if part["type"] == kind]


def _mapped(turns: list[Turn], change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Turn]:
    return [replace(turn, parts=[change(part) for part in turn.parts]) for turn in turns]
