"""CIDEr-D: n-grams shared with the references, each weighed by how few images' references have it.

It is a metric of a corpus: the weights are those of all rows that are scored, so one row alone
scores 0, and a row scores otherwise among others. Texts are cut into words by lower case and
without punctuation, in place of the Penn Treebank's tokeniser, which needs Java: "don't" is one
word here and two there.

Source: Vedantam et al., 2015; cider_scorer.py of pycocoevalcap 1.2.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LENGTHS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # words by which a length may differ
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")

Gram = tuple[str, ...]
Counts = list[Counter[Gram]]  # of each length


class Vector(NamedTuple):
    """A text as weighed n-grams."""

    weights: list[dict[Gram, float]]  # of each length
    norms: list[float]
    length: int  # bigrams, as in the source: one less than words


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of each answer, from 0 to 10, whose mean is that of the corpus.

    Args:
        answers: one of each row
        references: one or more of each row
    """
    counted = [[_counts(text) for text in texts] for texts in references]
    seen = Counter(gram for row in counted for gram in {g for text in row for c in text for g in c})
    rarity = _Rarity(seen, len(counted))
    scores = []
    for answer, texts in zip(answers, counted, strict=True):
        mine = rarity.vector(_counts(answer))
        near = [_similarity(mine, rarity.vector(text)) for text in texts]
        scores.append(10.0 * sum(near) / len(near))
    return scores


def words(text: str) -> list[str]:
    """Cut a text into words, in lower case and without punctuation."""
    return _WORD.findall(text.lower())


class _Rarity:
    """Weighs n-grams by the number of rows whose references have them."""

    def __init__(self, seen: Mapping[Gram, int], rows: int) -> None:
        self._seen, self._log_rows = seen, math.log(rows)

    def vector(self, counts: Counts) -> Vector:
        weights = [{gram: n * self._of(gram) for gram, n in one.items()} for one in counts]
        norms = [math.sqrt(sum(w * w for w in one.values())) for one in weights]
        return Vector(weights, norms, sum(counts[1].values()))

    def _of(self, gram: Gram) -> float:
        return self._log_rows - math.log(max(1, self._seen.get(gram, 0)))


def _counts(text: str) -> Counts:
    said = words(text)
    return [
        Counter(tuple(said[k : k + n]) for k in range(len(said) - n + 1))
        for n in range(1, LENGTHS + 1)
    ]


def _similarity(mine: Vector, theirs: Vector) -> float:
    """Return the mean cosine over the lengths of n-grams, less where the lengths differ."""
    total = 0.0
    for n in range(LENGTHS):
        a, b, norms = mine.weights[n], theirs.weights[n], mine.norms[n] * theirs.norms[n]
        shared = sum(min(weight, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, weight in a.items())
        total += shared / norms if norms else 0.0
    return total / LENGTHS * math.exp(-((mine.length - theirs.length) ** 2) / (2 * SIGMA**2))
