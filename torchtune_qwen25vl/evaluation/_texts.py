"""Metrics of texts: equal after normalisation, and near by edits.

Each takes an answer and its references and returns the best score over them, from 0 to 1.
"""

import re
import string
import unicodedata
from collections.abc import Sequence

_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(
    rf"(?!(?<=\d)\.(?=\d))(?!(?<!\w)-(?=\d))[{re.escape(string.punctuation)}]"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Return a text without what `exact_match` does not count.

    That is what the script of SQuAD 1.1 takes out, case, punctuation, articles and more than one
    space, but numbers stay: the point in 3.5 and the minus of -2 are kept, and 1,000 is 1000.
    Letters are compared in Unicode's form NFKC.

    Source: evaluate-v1.1.py of Rajpurkar et al., 2016.
    """
    text = _BETWEEN_DIGITS.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", text)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the answer is a reference once both are `normalised`, else 0."""
    return float(normalised(answer) in map(normalised, references))


def anls(answer: str, references: Sequence[str], *, threshold: float = 0.5) -> float:
    """Return the largest normalised Levenshtein similarity to a reference, 0 below the threshold.

    It is 1 - edits / length of the longer text; case and outer and double spaces do not count.
    Exactly at the threshold it counts, as in lmms-eval and anls-star; the formula of the paper
    takes 0 there.

    Args:
        answer: what the model said
        references: what it may have said
        threshold: least similarity that counts

    Source: Biten et al., Scene Text Visual Question Answering, 2019.
    """
    best = max(_similarity(_spaced(answer), _spaced(reference)) for reference in references)
    return best if best >= threshold else 0.0


def _spaced(text: str) -> str:
    return " ".join(text.casefold().split())


def _similarity(a: str, b: str) -> float:
    return 1.0 - edits(a, b) / max(len(a), len(b), 1)


def edits(a: str, b: str) -> int:
    """Count the characters to insert, delete or replace to make one text the other."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            replaced = diagonal + (left != right)
            diagonal, row[j] = row[j], min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]
