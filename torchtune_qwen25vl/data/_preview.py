"""A sample as text: exactly the tokens that go in, and which of them are trained on."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from torchtune_qwen25vl.data._check import trained_tokens

MARKS = {True: "train | ", False: "      | "}


def preview(sample: dict[str, Any], decode: Callable[..., str], placeholders: Sequence[int]) -> str:
    r"""Decode a sample line by line, marking the tokens that are trained on.

    Newlines are written out as `\n`; a run of placeholders is written once, with its length.

    Args:
        sample: sample with tokens and labels
        decode: decode method of the tokenizer
        placeholders: ids of the placeholders of images and videos
    """
    trained = trained_tokens(sample).tolist()
    tokens = [int(token) for token in sample["tokens"]]
    lines = []
    for mark, group in groupby(zip(trained, tokens, strict=True), key=lambda pair: pair[0]):
        text = _decoded([token for _, token in group], decode, placeholders)
        lines += [MARKS[mark] + line for line in text.replace("\n", "\\n\n").splitlines()]
    return "\n".join(lines)


def _decoded(tokens: list[int], decode: Callable[..., str], placeholders: Sequence[int]) -> str:
    texts = []
    for token, group in groupby(tokens, key=lambda token: token if token in placeholders else None):
        run = list(group)
        if token is None:
            texts.append(decode(run, skip_special_tokens=False))
        else:
            texts.append(f"{decode([token], skip_special_tokens=False)} x {len(run)}")
    return "".join(texts)
