"""Who speaks in a conversation, and what is shown in it."""

from collections.abc import Iterator, Sequence
from typing import Any

from torchtune.data import Message

HEADERS = {
    "system": "<|im_start|>system\n",
    "user": "<|im_start|>user\n",
    "assistant": "<|im_start|>assistant\n",
    "ipython": "<|im_start|>user\n",  # torchtune's role for what a tool returned
    "tool": "<|im_start|>user\n",
}
TOOL_ROLES = ("ipython", "tool")
PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


def media_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the content parts of a conversation that are images or videos, in order."""
    parts = [part for message in messages for part in message.content if part["type"] != "text"]
    for part in parts:
        if part["type"] not in PLACEHOLDERS:
            raise ValueError(
                f"a content part has type 'text', 'image' or 'video', got {part['type']!r}"
            )
    return parts


def turns(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the messages under each header: results of tools in a row, or parts of an answer."""
    turn: list[Message] = []
    for message in messages:
        if message.role not in HEADERS:
            raise ValueError(
                f"a message has one of the roles {list(HEADERS)}, got {message.role!r}"
            )
        if turn and not _same_turn(turn[-1], message):
            yield turn
            turn = []
        turn.append(message)
    if turn:
        yield turn


def _same_turn(before: Message, message: Message) -> bool:
    if message.role in TOOL_ROLES:
        return before.role in TOOL_ROLES
    return message.role == before.role == "assistant" and not before.eot
