"""What the formats share: fields, roles, placeholders in text, tools, and how a dataset is built.

The source of a dataset says where its rows are stored (`open_rows`), its builder how a row is laid
out.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data._options import OPTIONS
from torchtune_qwen25vl.data._weights import read_weight
from torchtune_qwen25vl.media import SUFFIXES, Rows, open_rows
from torchtune_qwen25vl.transform import Qwen25VLTransform

_SUFFIXES = ("", "s", "_url", "_urls", "_path", "_paths", "_file", "_files")
MEDIA = {f"{kind}{end}" for kind in ("image", "img", "video", "audio") for end in _SUFFIXES}
"""Keys, in any case, under which some format has media."""

MARKS = ("loss", "loss_scale", "weight")
"""Keys of a message that say its share in the loss, which are multiplied."""

MEDIA_COLUMNS = ("images", "image", "videos", "video")
STILLS = frozenset(SUFFIXES) - {".gif"}
"""Suffixes of files that are frames, where they stand for a video; a .gif may be a whole one."""

_PLACEHOLDER = r"<(image|video)>"


def required(row: Mapping[str, Any], key: str) -> Any:
    """Return the value under `key`.

    Raises:
        ValueError: if there is none, saying what there is.
    """
    if row.get(key) is None:
        raise ValueError(f"no {key!r} in the row, which holds {sorted(row)}")
    return row[key]


def refuse_media(row: Mapping[str, Any], *read: str) -> None:
    """Refuse media under keys that a format does not read: without them the row is another one.

    Args:
        row: row, or a message in it
        read: keys that are read
    """
    if unread := [k for k in row if str(k).lower() in MEDIA and k not in read and row[k]]:
        raise ValueError(
            f"media stand under {' or '.join(read) or 'keys of the row'} in this format, but there "
            f"is {', '.join(unread)}; rename it, or choose the builder of the rows' format"
        )


def refuse_option(options: Mapping[str, Any], name: str, reason: str) -> None:
    """Refuse an option that would change nothing."""
    if options.get(name):
        raise ValueError(f"{name} means nothing here, since {reason}; leave it out")


def videos_of(value: Any) -> list[Any]:
    """Make a list of the videos in a column, where a list of image files is one video."""
    videos = listed(value)
    return [videos] if videos and all(map(_is_still, videos)) else videos


def _is_still(source: Any) -> bool:
    name = source.get("path") if isinstance(source, Mapping) else source
    return isinstance(name, str) and Path(name).suffix.lower() in STILLS


def media_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return "images", "videos" and "fps" of a row that has media in `MEDIA_COLUMNS`."""
    return {
        "images": listed(row.get("images")) + listed(row.get("image")),
        "videos": videos_of(row.get("videos")) + videos_of(row.get("video")),
        "fps": row.get("fps"),
    }


def listed(value: Any) -> list[Any]:
    """Make a list of what may be a list, one thing, or nothing."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def override(known: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Put the names that are given in place of the known ones.

    Raises:
        ValueError: if one is given for what is not known.
    """
    if unknown := set(given) - set(known):
        raise ValueError(f"the names that can be mapped are {sorted(known)}, got {sorted(unknown)}")
    return {**known, **given}


def role_of(name: str, roles: Mapping[str, str]) -> str:
    """Return torchtune's role of a format's speaker; an unknown one is never guessed.

    Raises:
        ValueError: if the name is not in `roles`.
    """
    if name not in roles:
        raise ValueError(f"a speaker is one of {sorted(roles)}, got {name!r}")
    return roles[name]


def marks_of(message: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Return "trained" and "weight" of a message's turn, by its loss, loss_scale and weight.

    Raises:
        ValueError: if a mark is none, or asks for loss on what an assistant does not say.
    """
    given = {key: message[key] for key in MARKS if message.get(key) is not None}
    if given.get("loss", True) not in (True, False):
        raise ValueError(
            f"'loss' is true, false, 0 or 1, got {given['loss']!r}; a share of the loss is called "
            "'loss_scale' or 'weight'"
        )
    weights = {key: read_weight(key, mark) for key, mark in given.items()}
    for key, weight in weights.items():
        if weight and role != "assistant":
            raise ValueError(
                f"only an assistant's turns are trained on, but {key!r} marks {role!r}"
            )
    weight = math.prod(weights.values())
    return {"trained": weight > 0, "weight": weight or 1.0}


def parts_of(text: str, *, role: str, join_newline: bool = False) -> list[dict[str, Any]]:
    """Split a text at `<image>` and `<video>`, which stand for the row's next image or video.

    Placeholders are read in what a user says or a tool returns; in a system prompt or an answer
    they are text. Apart from them every character is kept.

    Args:
        text: what was said
        role: who said it
        join_newline: whether one newline before and one after a placeholder belong to it
    """
    if not isinstance(text, str):
        raise ValueError(
            f"a text is a string, got {type(text).__name__} {text!r:.80}; lists of parts are read "
            "by openai_dataset and hf_dataset"
        )
    if role not in ("user", "ipython"):
        return [{"type": "text", "content": text}]
    pieces = re.split(rf"\n?{_PLACEHOLDER}\n?" if join_newline else _PLACEHOLDER, text)
    parts = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append({"type": piece, "content": None})
        elif piece:
            parts.append({"type": "text", "content": piece})
    return parts


def calls_of(calls: Any, **marks: Any) -> Iterator[Turn]:
    """Make turns that call tools of `{"name", "arguments"}`, OpenAI's wrapping of it, or a list.

    Args:
        calls: one call or several, also as JSON text
        **marks: "trained" and "weight" of their turns

    Raises:
        ValueError: if a call has no name, or its arguments are no JSON object.
    """
    for call in listed(_from_json(calls)):
        function = call.get("function", call)
        arguments = _from_json(function.get("arguments", {}))
        if "name" not in function or not isinstance(arguments, dict):
            raise ValueError(f"a tool call has a name and an object of arguments, got {call}")
        text = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        yield Turn("assistant", [{"type": "text", "content": text}], is_call=True, **marks)


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """Return JSON schemas of tools, also from JSON text; bare functions get OpenAI's wrapping."""
    if not tools:
        return None
    return [
        tool if "function" in tool else {"type": "function", "function": tool}
        for tool in listed(_from_json(tools))
    ]


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def conversations(
    model_transform: Qwen25VLTransform,
    source: str,
    parse: Callable[[dict[str, Any]], Conversation],
    options: Mapping[str, Any],
) -> SampleDataset:
    rows, common = opened(source, options)
    split = options.get("split")
    return sample_dataset(model_transform, rows, parse, source=source, split=split, **common)


def opened(source: str, options: Mapping[str, Any]) -> tuple[Rows, dict[str, Any]]:
    """Open the rows, and return them with those of the options that are `Options`."""
    common = {name: value for name, value in options.items() if name in OPTIONS}
    others = {name: value for name, value in options.items() if name not in OPTIONS}
    return open_rows(source, **others), common
