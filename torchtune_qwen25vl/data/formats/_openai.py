"""OpenAI's and Qwen's rows: messages of content parts, each image or video in its own part::

{"messages": [
    {"role": "user", "content": [
        {"type": "image", "image": "file:///p/a.jpg"},
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "video", "video": "b.mp4"},
        {"type": "text", "text": "Describe."}]},
    {"role": "assistant", "content": "A cat.", "tool_calls": [...], "weight": 1}],
 "tools": [...]}
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data._frames import SAMPLING
from torchtune_qwen25vl.data.formats._shared import (
    calls_of,
    conversations,
    marks_of,
    refuse_media,
    refuse_option,
    required,
    role_of,
    tools_of,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "ipython",
}
TYPES = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
SOURCES = ("path", "url", "base64")
PART_OPTIONS = {  # Qwen's, for one medium
    "image": ("min_pixels", "max_pixels"),
    "video": SAMPLING,
}
REFUSED = (
    *("resized_height", "resized_width", "total_pixels", "nframes", "video_start", "video_end"),
    *("sample_fps", "raw_fps"),
)


def parse_openai(row: dict[str, Any]) -> Conversation:
    """Parse one row whose parts hold their images and videos."""
    refuse_media(row)
    turns = turns_of_parts(required(row, "messages"), "user")
    return Conversation(turns, tools=tools_of(row.get("tools")))


def turns_of_parts(messages: Any, role: str) -> list[Turn]:
    if isinstance(messages, str):
        return [Turn(role, [_text(messages)])]
    return [turn for message in messages for turn in _turns_of(message)]


def _turns_of(message: Mapping[str, Any]) -> list[Turn]:
    refuse_media(message)
    role = role_of(required(message, "role"), ROLES)
    marks = marks_of(message, role)
    content, calls = message.get("content"), message.get("tool_calls")
    turns = list(calls_of(calls or [], **marks))
    if content or not turns:
        content = required(message, "content")
        parts = [_text(content)] if isinstance(content, str) else [_part(part) for part in content]
        turns.insert(0, Turn(role, parts, **marks))
    return turns


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = required(part, "type")
    if kind == "text":
        refuse_media(part)
        return _text(required(part, "text"))
    if kind not in TYPES:
        raise ValueError(f"a part has a type of text, {', '.join(TYPES)}; got {kind!r}")
    given = [key for key in (kind, TYPES[kind], *SOURCES) if part.get(key) is not None]
    content = _source(given[0], part[given[0]]) if given else None
    return {"type": TYPES[kind], "content": content, **_options(TYPES[kind], part)}


def _options(kind: str, part: Mapping[str, Any]) -> dict[str, Any]:
    known = {key for keys in PART_OPTIONS.values() for key in keys}.union(REFUSED)
    given = {key: part[key] for key in known if part.get(key) is not None}
    if others := given.keys() - PART_OPTIONS[kind]:
        raise ValueError(
            f"of {kind} parts only {PART_OPTIONS[kind]} are heeded, got {sorted(others)}"
        )
    return given


def _source(key: str, value: Any) -> Any:
    if key.endswith("_url") and isinstance(value, Mapping):
        return required(value, "url")
    if key == "base64":
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the base64 text of a part is damaged ({error})") from error
    return value


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "content": text}


def openai_dataset(
    model_transform: Qwen25VLTransform, *, source: str, **options: Any
) -> SampleDataset:
    """Build a dataset of OpenAI's and Qwen's messages of parts, each medium in its own part.

    Args:
        model_transform: tokenizer of the recipe
        source: .jsonl or .json file, or another that `open_rows` takes
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    refuse_option(options, "prepend_media", "every image and video stands in its own part")
    return conversations(model_transform, source, parse_openai, options)
