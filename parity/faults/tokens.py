"""Faults of the tokenizer, made in the tokens that it returns.

Tokens of a conversation are runs: tokens that have a name, and the text between them.
"""

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl import Qwen25VLTokenizer

# tokenizer, the token before a run or None, the tokens of the run -> the tokens in its place
Rewrite = Callable[[Qwen25VLTokenizer, int | None, Sequence[int]], list[int]]


def _rewritten(rewrite: Rewrite) -> Fault:
    """A fault in the runs of text of a conversation."""

    def make(right: Callable) -> Callable:
        def wrong(
            self: Qwen25VLTokenizer, *args: Any, **options: Any
        ) -> tuple[list[int], list[bool]]:
            named = set(self.special_tokens.values())
            tokens: list[int] = []
            mask: list[bool] = []
            pairs = zip(*right(self, *args, **options), strict=True)
            for is_named, run in groupby(pairs, key=lambda pair: pair[0] in named):
                run_tokens, run_mask = map(list, zip(*run, strict=True))
                if not is_named:
                    run_tokens = rewrite(self, tokens[-1] if tokens else None, run_tokens)
                    run_mask = [all(run_mask)] * len(run_tokens)
                tokens += run_tokens
                mask += run_mask
            return tokens, mask

        return wrong

    return replaced(Qwen25VLTokenizer, make, "chat tokens", method="tokenize_messages")


def _names_become_tokens(
    tokenizer: Qwen25VLTokenizer, before: int | None, run: Sequence[int]
) -> list[int]:
    names = "|".join(map(re.escape, tokenizer.special_tokens))
    pieces = re.split(f"({names})", tokenizer.decode(run))
    return [
        token
        for piece in pieces
        for token in (
            [tokenizer.special_tokens[piece]]
            if piece in tokenizer.special_tokens
            else tokenizer.encode(piece)
        )
    ]


def _header_apart(
    tokenizer: Qwen25VLTokenizer, before: int | None, run: Sequence[int]
) -> list[int]:
    if before != tokenizer.special_tokens["<|im_start|>"]:
        return list(run)
    role, line, text = tokenizer.decode(run).partition("\n")
    return tokenizer.encode(role + line) + tokenizer.encode(text)


def _no_line_after_turns(
    tokenizer: Qwen25VLTokenizer, before: int | None, run: Sequence[int]
) -> list[int]:
    return [] if before == tokenizer.special_tokens["<|im_end|>"] else list(run)


FAULTS: dict[str, Fault] = {
    "names in a user's text become tokens": _rewritten(_names_become_tokens),
    "texts that touch encoded apart": _rewritten(_header_apart),
    "no line after a turn": _rewritten(_no_line_after_turns),
}
