"""One row of any format, and who may speak when in it.

A format's own module turns its row into a `Conversation`; what comes after is common to all and
happens in the dataloader's worker: `_reader` fills in media and boxes, `to_messages` checks roles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchtune.data import Message

_FOLLOWS: dict[str | None, tuple[str, ...]] = {  # None is the beginning
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "ipython"),
    "ipython": ("assistant", "ipython"),
}


@dataclass(frozen=True)
class Turn:
    """What one speaker says.

    Attributes:
        role: role in torchtune: system, user, assistant or ipython (what a tool returned)
        parts: content parts, `{"type": "text" | "image" | "video", "content": ...}`; the content of
            a medium is its source, or None for the next one of the row's own list
        trained: whether an assistant's turn is trained on
        is_call: whether an assistant's turn is a call of a tool
        weight: share of its labels in the loss, where those of others have 1
    """

    role: str
    parts: list[dict[str, Any]]
    trained: bool = True
    is_call: bool = False
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """A row, before its media are read.

    Attributes:
        turns: turns in order
        images: sources of the images whose places the turns mark
        videos: sources of the videos whose places the turns mark
        fps: frames that pass in a second of these videos, where they are frames: a number, or one
            for each of them
        objects: ms-swift's `objects`, which replace `<bbox>` and `<ref-object>`
        tools: JSON schemas of the functions the assistant may call
    """

    turns: list[Turn]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    fps: Any = None
    objects: Mapping[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


def to_messages(turns: list[Turn]) -> list[Message]:
    """Check the order of speakers and make torchtune messages, masked where not trained on.

    A call of a tool shares the turn of the assistant message before it.

    Raises:
        ValueError: if a turn is out of order, a text is no string, an answer to train on is empty,
            or there is nothing to train on.
    """
    messages: list[Message] = []
    before = None
    for i, turn in enumerate(turns):
        joins = turn.is_call and before == "assistant"
        if not joins and turn.role not in _FOLLOWS[before]:
            raise ValueError(
                f"turn {i} is of role {turn.role!r}, but after {before or 'the beginning'} comes "
                f"{' or '.join(_FOLLOWS[before])}; merge or drop turns"
            )
        texts = [part["content"] for part in turn.parts if part["type"] == "text"]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a text is a string, got {wrong[0]!r:.80} in turn {i}")
        if joins:
            messages[-1].eot = False
        trained = turn.role == "assistant" and turn.trained
        message = Message(turn.role, turn.parts, masked=not trained, ipython=turn.is_call)
        if trained and not message.text_content.strip():
            raise ValueError(f"turn {i} is an empty answer; drop it, or do not train on it")
        messages.append(message)
        before = turn.role
    if all(message.masked for message in messages):
        raise ValueError("no answer of an assistant is trained on, so the row teaches nothing")
    return messages
