"""Metrics of texts: equal after normalisation, and near by edits.

Each takes an answer and its references and returns the best score over them, from 0 to 1.
"""

from collections.abc import Sequence

from torchtune_qwen25vl.data import normalised


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
