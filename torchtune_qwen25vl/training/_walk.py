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
from torchtune_qwen25vl.media import StreamRows
from torchtune_qwen25vl.training._feeding import Streams
from torchtune_qwen25vl.training._mixing import Portion

FILES = "rows of files"  # of streams, in a checkpoint
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
        streams: the streams that rows are read from, None if there are none
    """

    places: int
    left_out: tuple[int, ...] = ()
    empty: tuple[int, ...] = ()
    digest: str | None = None
    portions: tuple[Portion, ...] = ()
    streams: Streams | None = None

    @property
    def window(self) -> int | None:
        """Number of places that are shuffled among themselves, None for all; not for a mixture."""
        return self.streams.window if self.streams is not None and not self.portions else None

    @property
    def of_pass(self) -> int:
        """Number of places that a pass has, of a mixture some more than once or not at all."""
        return sum(portion.seen for portion in self.portions) if self.portions else self.places

    def some_places(self, count: int) -> list[int]:
        """Return about so many places that have a sample, evenly spread, but of a stream first."""
        near: list[int] = []
        first = 0
        for portion in self.portions or [Portion("", self.places, self.places, self.window)]:
            size = portion.places if portion.window is None else min(portion.places, count)
            near += range(first, first + size, -(-size // count))
            first += portion.places
        empty = set(self.empty)
        filled = [place for place in near if place not in empty]
        filled = filled or [next(place for place in range(self.places) if place not in empty)]
        return filled[:: -(-len(filled) // count)]

    def identity(self) -> dict[str, Any]:
        """Return what may not change for a run to go on; rows may leave, but not come back."""
        return {
            "samples": self.places,
            "rows left out": list(self.left_out),
            "rows": self.digest,
        }

    def learned(self) -> dict[str, Any]:
        """Return what a run that goes on need not find out again, beside its identity."""
        return {} if self.streams is None else {FILES: self.streams.learned()}


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
    left_out = sorted(then)
    empty = tuple(row - bisect_left(left_out, row) for row in sorted(now - then))
    places = _places(parts_of(dataset), left_out)
    streams = Streams(parts_of(dataset), places, empty)
    streams.learn((begun or {}).get(FILES, ()))
    walk = Walk(sum(places), tuple(left_out), empty, digest)
    return replace(walk, streams=streams) if streams.window else walk


def parts_of(dataset: SampleDataset | JoinedDataset) -> Sequence[SampleDataset]:
    """Return the data sets that one is made of, or the one."""
    return dataset.parts if isinstance(dataset, JoinedDataset) else [dataset]


def samples_of(dataset: Any) -> Any:
    """Return the samples at the places of a walk: of a mixture every row of every part, once."""
    return dataset.joined if isinstance(dataset, Mixture) else dataset


def _portions(mixture: Mixture, left_out: Sequence[int]) -> tuple[Portion, ...]:
    """Return how much of each part a pass has, by the rows with which the run began."""
    parts = mixture.joined.parts
    places = _places(parts, left_out)
    return tuple(
        Portion(own.source, number, own.of_pass(number), _window(part))
        for part, own, number in zip(parts, mixture.amounts, places, strict=True)
    )


def _places(parts: Sequence[SampleDataset], left_out: Sequence[int]) -> list[int]:
    """Return how many places each part has, of whose rows, counted through, some are left out."""
    found, first = [], 0
    for part in parts:
        end = first + len(part.rows)
        found.append(end - first - bisect_left(left_out, end) + bisect_left(left_out, first))
        first = end
    return found


def _window(part: SampleDataset) -> int | None:
    return part.rows.window if isinstance(part.rows, StreamRows) else None


def digest_rows(dataset: SampleDataset | JoinedDataset) -> str:
    """Return a short name of what stands in the rows, left out or not.

    Media that lie in files of their own are not read, and of a stream the first rows are.
    """
    digest, rows = hashlib.sha256(), dataset.rows
    if isinstance(rows, StreamRows):
        return rows.identity()
    if any(map(_window, parts_of(dataset))):
        for part in parts_of(dataset):
            digest.update(digest_rows(part).encode())
        return digest.hexdigest()[:16]
    for row in np.unique(np.linspace(0, len(rows) - 1, HASHED).round().astype(int)).tolist():
        digest.update(rows.digest(row).encode())
    return digest.hexdigest()[:16]
