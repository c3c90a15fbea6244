"""Rows of streams for the workers of a loader: read once by each rank, and sent with their keys.

Workers read nothing of a stream. A thread of the rank's own process reads as many rows ahead as the
stream is shuffled among, so that a step waits for none.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

from torch.utils.data import Dataset, Sampler

from torchtune_qwen25vl._ahead import Ahead
from torchtune_qwen25vl.data import SampleDataset
from torchtune_qwen25vl.media import StreamRows


class Fetched(NamedTuple):
    """A row of a stream.

    Attributes:
        part: number of the data set that it is a row of
        row: number of the row
        stored: what the stream has there
    """

    part: int
    row: int
    stored: dict[str, Any]


class Streams:
    """The streams among the parts of a data set.

    Args:
        parts: data sets, one after the other
        places: number of the places of each in a run
        empty: places, in ascending order, for which there is no sample, see `SeededDataset`
    """

    def __init__(
        self, parts: Sequence[SampleDataset], places: Sequence[int], empty: Sequence[int]
    ) -> None:
        self.parts, self.empty = parts, empty
        self._places = [*accumulate(places, initial=0)]
        self._samples = [*accumulate(map(len, parts), initial=0)]

    @property
    def window(self) -> int:
        """Number of rows among which the streams are shuffled, the most of all; 0 without any."""
        windows = (part.rows.window for part in self.parts if isinstance(part.rows, StreamRows))
        return max(windows, default=0)

    def learned(self) -> list[dict[int, int]]:
        """Return how many rows are in each file of each part, as far as that is known."""
        return [
            part.rows.learned() if isinstance(part.rows, StreamRows) else {} for part in self.parts
        ]

    def learn(self, known: Iterable[Mapping[int, int]]) -> None:
        """Take over what `learned` told, so that a run begins in the file where it goes on."""
        for part, rows in zip(self.parts, known, strict=False):
            if isinstance(part.rows, StreamRows):
                part.rows.learn(rows)

    def fetch(self, place: int) -> Fetched | None:
        """Read the row at a place, None if it is none of a stream.

        What is asked for next stands in the same window as this place, or behind it.
        """
        index = index_of(place, self.empty, self._samples[-1])
        number = bisect_right(self._samples, index) - 1
        part = self.parts[number]
        if not isinstance(part.rows, StreamRows):
            return None
        since = place - (place - self._places[number]) % part.rows.window
        first = index_of(since, self.empty, self._samples[-1])
        row, begin = (part.row_of(max(k - self._samples[number], 0)) for k in (index, first))
        return Fetched(number, row, part.rows.fetch(row, begin))

    def hand(self, fetched: Fetched) -> None:
        """Give a row to the data set, in whichever process that is."""
        rows = self.parts[fetched.part].rows
        assert isinstance(rows, StreamRows)
        rows.hand(fetched.row, fetched.stored)


class Feeding(Sampler[list[tuple[Any, Fetched | None]]]):
    """The keys of a sampler, each with the row that it needs.

    Args:
        sampler: yields the keys of one step after another
        streams: read as far as the steps need them
    """

    def __init__(self, sampler: Any, streams: Streams) -> None:
        self.sampler, self.streams = sampler, streams

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[Any, Fetched | None]]]:
        steps = iter(self.sampler)
        first = next(steps, None)
        if first is None:
            return
        depth = max(2, self.streams.window // len(first))
        ahead = Ahead(self._fed(chain([first], steps)), depth)
        try:
            yield from ahead
        finally:
            ahead.close()

    def _fed(self, steps: Iterable[Any]) -> Iterator[list[tuple[Any, Fetched | None]]]:
        for keys in steps:
            yield [(key, self.streams.fetch(key.place)) for key in keys]


class Fed(Dataset):
    """A data set that is asked by keys with the rows they need.

    Args:
        dataset: data set by key
        streams: streams of the data set
    """

    def __init__(self, dataset: Any, streams: Streams) -> None:
        self.dataset, self.streams = dataset, streams

    def __getitem__(self, fed: tuple[Any, Fetched | None]) -> Mapping[str, Any]:
        """Return the sample of a key."""
        key, fetched = fed
        if fetched is not None:
            self.streams.hand(fetched)
        return self.dataset[key]


def index_of(place: int, empty: Sequence[int], samples: int) -> int:
    """Return the index of the sample at a place; where there is none, of one beside it.

    Args:
        place: place of a run
        empty: places without a sample, in ascending order
        samples: number of all samples
    """
    return min(place - bisect_left(empty, place), samples - 1)
