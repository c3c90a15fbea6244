"""A sample as text: exactly the tokens that go in, and which of them are trained on."""

from itertools import groupby
from typing import Any

from torchtune_qwen25vl.data._check import trained_tokens
from torchtune_qwen25vl.data._weights import token_weights
from torchtune_qwen25vl.transform import PLACEHOLDERS, Qwen25VLTransform, written_names

MARKS = {1.0: "train | ", 0.0: "      | "}


def preview(sample: dict[str, Any], tokenizer: Qwen25VLTransform) -> str:
    r"""Decode a sample line by line, marking the tokens that are trained on.

    Those whose label has a weight other than 1 are marked by it. Newlines are written out as `\n`;
    a run of placeholders is written once, with its length. The name of a token that stands there
    as characters, not as the token, has a backslash before it.

    Args:
        sample: sample with tokens and labels
        tokenizer: transform that made it
    """
    trained = token_weights(sample, trained_tokens(sample))
    tokens = [int(token) for token in sample["tokens"]]
    lines = []
    for mark, group in groupby(zip(trained, tokens, strict=True), key=lambda pair: pair[0]):
        text = _decoded([token for _, token in group], tokenizer)
        sign = MARKS.get(mark, f"x{mark:<4.4g} | ")
        lines += [sign + line for line in text.replace("\n", "\\n\n").splitlines()]
    return "\n".join(lines)


def _decoded(tokens: list[int], tokenizer: Qwen25VLTransform) -> str:
    placeholders = {tokenizer.special_tokens[name] for name in PLACEHOLDERS.values()}
    named = set(tokenizer.special_tokens.values())
    texts = []
    for token, group in groupby(tokens, key=lambda token: token if token in named else None):
        run = list(group)
        text = tokenizer.decode(run, skip_special_tokens=False)
        if token is None:
            for name in set(written_names(text)):
                text = text.replace(name, f"\\{name}")
        elif token in placeholders:
            text = f"{tokenizer.decode([token], skip_special_tokens=False)} x {len(run)}"
        texts.append(text)
    return "".join(texts)
