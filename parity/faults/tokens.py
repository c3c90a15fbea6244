"""Faults of the tokenizer."""

from collections.abc import Callable, Iterator
from typing import Any

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl.transform._tokenizer import Piece, Qwen25VLTokenizer


def _names_become_tokens(right: Callable) -> Callable:
    def wrong(self: Qwen25VLTokenizer, *args: Any) -> Iterator[Piece]:
        for piece, trained in right(self, *args):
            if isinstance(piece, str):
                yield from self._markup(piece, trained)
            else:
                yield piece, trained

    return wrong


def _apart(right: Callable) -> Callable:
    def wrong(self: Qwen25VLTokenizer, pieces: Iterator[Piece]) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        mask: list[bool] = []
        for piece in pieces:
            more_tokens, more_mask = right(self, iter([piece]))
            tokens += more_tokens
            mask += more_mask
        return tokens, mask

    return wrong


def _no_line_after_turns(right: Callable) -> Callable:
    def wrong(self: Qwen25VLTokenizer, *args: Any) -> Iterator[Piece]:
        return (piece for piece in right(self, *args) if piece[0] != "\n")

    return wrong


FAULTS: dict[str, Fault] = {
    "names in a user's text become tokens": patched(
        Qwen25VLTokenizer, "_message", _names_become_tokens, "chat tokens"
    ),
    "texts that touch encoded apart": patched(
        Qwen25VLTokenizer, "_encode_pieces", _apart, "chat tokens"
    ),
    "no line after a turn": patched(
        Qwen25VLTokenizer, "_template", _no_line_after_turns, "chat tokens"
    ),
}
