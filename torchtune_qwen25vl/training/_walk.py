"""The rows that a run walks through: the same places for as long as it lasts.

A run keeps the places of the rows it began with. A row that turned bad later, and is left out by
`skip_bad_rows` from then on, leaves its place empty: its step has one sample less, and every other
row is seen when it would have been.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchtune_qwen25vl.data import JoinedDataset, Mixture, SampleDataset
from torchtune_qwen25vl.training._mixing import Portion

HASHED = 10_000  # rows whose content is compared; of longer tables as many, spread evenly


@dataclass(frozen=True)
class Walk:
    """Places of a run, each a row.

    Attributes:
        places: number of places, which is that of the rows with which the run began
        left_out: numbers of the rows that it left out from its beginning
        empty: places of rows that were left out since then
        digest: short name of what stands in the rows, None for data sets of other kinds than ours
        portions: how much of each part of a mixture a pass has; places are those of all parts
    """

    places: int
    left_out: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    digest: str | None = None
    portions: tuple[Portion, ...] = ()

    @property
    def of_pass(self) -> int:
        """Number of places that a pass has, of a mixture some more than once or not at all."""
        return sum(portion.seen for portion in self.portions) if self.portions else self.places

    def identity(self) -> dict[str, Any]:
        """Return what may not change for a run to go on; rows may leave, but not come back."""
        return {
            "samples": self.places,
            "rows left out": list(self.left_out),
            "rows": self.digest,
        }


def plan_walk(dataset: Any, begun: Mapping[str, Any] | None) -> Walk:
    """Return the walk of a run that begins, or goes on.

    Args:
        dataset: data set as it is now
        begun: identity of the run that goes on, from its checkpoint; None if it begins
    """
    if isinstance(dataset, Mixture):
        walk = plan_walk(dataset.joined, begun)
        return replace(walk, portions=_portions(dataset, walk.left_out))
    if not isinstance(dataset, SampleDataset | JoinedDataset):
        return Walk(len(dataset))
    now = set(dataset.bad_rows)
    then = set(begun["rows left out"]) if begun else now
    digest = digest_rows(dataset)
    if not then <= now:  # a row is back: the identity tells
        return Walk(len(dataset), tuple(sorted(now)), digest=digest)
    rows = np.setdiff1d(np.arange(len(dataset.rows)), sorted(then))
    empty = np.searchsorted(rows, sorted(now - then))
    return Walk(len(rows), tuple(sorted(then)), tuple(empty.tolist()), digest)


def samples_of(dataset: Any) -> Any:
    """Return the samples at the places of a walk: of a mixture every row of every part, once."""
    return dataset.joined if isinstance(dataset, Mixture) else dataset


def _portions(mixture: Mixture, left_out: Sequence[int]) -> tuple[Portion, ...]:
    """Return how much of each part a pass has, by the rows with which the run began."""
    found, first = [], 0
    for part, own in zip(mixture.joined.parts, mixture.amounts, strict=True):
        end = first + len(part.rows)
        places = len(part.rows) - bisect_left(left_out, end) + bisect_left(left_out, first)
        found.append(Portion(own.source, places, own.of_pass(places)))
        first = end
    return tuple(found)


def digest_rows(dataset: SampleDataset | JoinedDataset) -> str:
    """Return a short name of what stands in the rows, left out or not.

    Media that lie in files of their own are not read.
    """
    digest, rows = hashlib.sha256(), dataset.rows
    for row in np.unique(np.linspace(0, len(rows) - 1, HASHED).round().astype(int)).tolist():
        digest.update(rows.digest(row).encode())
    return digest.hexdigest()[:16]
