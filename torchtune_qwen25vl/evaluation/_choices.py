"""Metrics of multiple choice: the likeliest letter, and the one that the answer names."""

import re
import string
from collections.abc import Sequence

from torchtune_qwen25vl.evaluation._texts import normalised

LETTERS = string.ascii_uppercase
_ALONE = re.compile(r"^\(?([A-Z])(?:[).:,]|\s*$)")
_NAMED = re.compile(r"\b(?:answer|option|choice) (?:is|:)?\s*\(?([A-Z])\b")


def choice(log_probs: Sequence[float], right: int) -> float:
    """Return 1 if the right choice's letter is the likeliest to come first in the answer, else 0.

    Args:
        log_probs: log-probability of each letter after the prompt
        right: index of the right choice
    """
    return float(max(range(len(log_probs)), key=log_probs.__getitem__) == right)


def choice_by_answer(answer: str, choices: Sequence[str], right: int) -> float:
    """Return 1 if the answer names the right choice, else 0.

    It names one by its letter, alone or before a bracket, a point, a colon or a comma, by "answer
    is B", or by the words of the choice, `normalised`.

    Args:
        answer: what the model said
        choices: words of each choice
        right: index of the right one
    """
    said = answer.strip()
    for pattern in (_ALONE, _NAMED):
        if found := pattern.search(said):
            return float(LETTERS.index(found[1]) == right)
    return float(normalised(said) == normalised(choices[right]))


def listed(choices: Sequence[str]) -> str:
    """Write choices as the lines of a prompt, each behind its letter."""
    pairs = zip(LETTERS, choices, strict=False)
    return "\n".join(f"{letter}. {words}" for letter, words in pairs)
