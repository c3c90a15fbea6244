"""Media listed beside a conversation, put where its turns mark places for them."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn


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
    queues = {kind: iter(given) for kind, given in sources.items()}
    return [replace(turn, parts=[_filled(part, queues) for part in turn.parts]) for turn in turns]


def _places(turns: list[Turn]) -> Iterator[dict[str, Any]]:
    return (part for turn in turns for part in turn.parts if part["content"] is None)


def _prepended(turns: list[Turn], kind: str) -> list[Turn]:
    first = [turn.role for turn in turns].index("user")
    turn = replace(turns[first], parts=[{"type": kind, "content": None}, *turns[first].parts])
    return [*turns[:first], turn, *turns[first + 1 :]]


def _filled(part: dict[str, Any], queues: dict[str, Iterator[Any]]) -> dict[str, Any]:
    if part["content"] is not None:
        return part
    return {**part, "content": next(queues[part["type"]])}
