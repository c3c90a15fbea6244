"""Media listed beside a conversation, put where its turns mark places for them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn

OF_ROW = "fps of the row"  # key of a video's part


def fill_places(conversation: Conversation, *, prepend_media: bool) -> list[Turn]:
    """Give every image and video of the turns its source, taken from the row's lists in order.

    Args:
        conversation: conversation of one row
        prepend_media: whether a row that lists one medium, and marks no place, shows it first

    Raises:
        ValueError: if there are more or fewer places than media of a kind.
    """
    turns = conversation.turns
    sources = {"image": conversation.images, "video": conversation.videos}
    listed = [kind for kind, given in sources.items() for _ in given]
    marked = [part["type"] for part in _places(turns)]
    if prepend_media and len(listed) == 1 and not marked:
        turns = _prepended(turns, listed[0])
        marked = listed
    for kind, given in sources.items():
        if marked.count(kind) != len(given):
            raise ValueError(
                f"every {kind} of the row needs its place, got {marked.count(kind)} places "
                f"(<{kind}> in a text, or a part without a source) for {len(given)} {kind}s; "
                "prepend_media shows a single one first"
            )
    images = iter({"content": image} for image in conversation.images)
    queues = {"image": images, "video": iter(_videos(conversation))}
    return [replace(turn, parts=[_filled(part, queues) for part in turn.parts]) for turn in turns]


def _videos(conversation: Conversation) -> list[dict[str, Any]]:
    """Return what the parts of the row's videos hold: their source, and their rate if it says so.

    Raises:
        ValueError: if there is not one rate for each video.
    """
    videos, fps = conversation.videos, conversation.fps
    if fps is None:
        return [{"content": video} for video in videos]
    rates = fps if isinstance(fps, list) else [fps] * len(videos)
    if len(rates) != len(videos):
        raise ValueError(
            f"fps is a number, or one for each video, got {fps!r} for {len(videos)} videos"
        )
    return [{"content": v, OF_ROW: rate} for v, rate in zip(videos, rates, strict=True)]


def _places(turns: list[Turn]) -> Iterator[dict[str, Any]]:
    return (part for turn in turns for part in turn.parts if part["content"] is None)


def _prepended(turns: list[Turn], kind: str) -> list[Turn]:
    first = [turn.role for turn in turns].index("user")
    turn = replace(turns[first], parts=[{"type": kind, "content": None}, *turns[first].parts])
    return [*turns[:first], turn, *turns[first + 1 :]]


def _filled(part: dict[str, Any], queues: dict[str, Iterator[dict[str, Any]]]) -> dict[str, Any]:
    if part["content"] is not None:
        return part
    return {**part, **next(queues[part["type"]])}
