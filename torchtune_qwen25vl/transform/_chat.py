"""A conversation whose images and videos are read.

Shapes: p patches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor
from torchtune.data import Message

from torchtune_qwen25vl.transform._geometry import PATCHES_PER_PLACEHOLDER
from torchtune_qwen25vl.transform._turns import media_parts, turns


@dataclass(frozen=True)
class Medium:
    """One image or video, read.

    Attributes:
        pixel_values: patches, [p, 1176]
        grid_thw: grid in patches, [1, 3]
        seconds: time from one frame group of a video to the next; None for an image
    """

    pixel_values: Tensor
    grid_thw: Tensor
    seconds: float | None = None

    @property
    def num_placeholders(self) -> int:
        return len(self.pixel_values) // PATCHES_PER_PLACEHOLDER


@dataclass(frozen=True)
class Chat:
    """A conversation and its media in order.

    Attributes:
        messages: messages of the conversation
        tools: JSON schemas of the functions an assistant may call
        media: images and videos, in the order of the messages' parts
        inference: whether an answer is asked for
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    media: Sequence[Medium]
    inference: bool

    def beginnings(self) -> Iterator["Chat"]:
        """Yield the beginnings of the conversation that end with an answer, the longest first."""
        conversation = list(turns(self.messages))
        ends = accumulate(map(len, conversation))
        after_answers = [
            end for end, turn in zip(ends, conversation, strict=True) if turn[0].role == "assistant"
        ]
        for end in reversed(after_answers):
            messages = self.messages[:end]
            yield replace(self, messages=messages, media=self.media[: len(media_parts(messages))])
