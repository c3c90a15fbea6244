"""The files of a stream of `datasets`, one after the other, and the number of rows in each."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen


class Shards:
    """The shards of a stream, each a file as a rule.

    The number of rows in a shard is known once it was read to its end; that of a Parquet file is
    read from its footer.

    Attributes:
        known: number of rows of each shard for which it is known
        number: number of shards
        features: features of the stream, None if it does not tell

    Args:
        stream: a stream of `datasets`
        parquet: address of each shard, where these are whole Parquet files; else none
        access: how datasets reaches these
        at_once: number of rows that make a table
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        parquet: Sequence[str],
        access: datasets.DownloadConfig,
        at_once: int,
    ) -> None:
        self._stream, self._at_once = stream.with_format("arrow"), at_once
        self._parquet = parquet if len(parquet) == stream.num_shards else ()
        self._access = access
        self.known: dict[int, int] = {}
        self.number = stream.num_shards
        self.features: datasets.Features | None = stream.features

    def find(self, row: int) -> tuple[int, int]:
        """Return the shard to read a row from, and the number of rows before it.

        It is the row's own where the rows of all before it are known, and else an earlier one.
        """
        passed = 0
        for shard in range(self.number - 1):
            rows = self._count(shard)
            if rows is None or passed + rows > row:
                return shard, passed
            passed += rows
        return self.number - 1, passed

    def tables(self, first: int) -> Iterator[pa.Table]:
        """Yield the tables of the shards from one of these on."""
        for shard in range(first, self.number):
            rows = 0
            for table in self._stream.shard(self.number, shard).iter(self._at_once):
                rows += len(table)
                yield table
            self.known[shard] = rows

    def filled(self, value: Any) -> Any:
        """Return what a row holds, with the bytes of media that are files of a network."""
        if isinstance(value, list):
            return [self.filled(one) for one in value]
        if not isinstance(value, dict):
            return value
        if _is_remote(value):
            with xopen(value["path"], "rb", download_config=self._access) as file:
                return {**value, "bytes": file.read()}
        return {name: self.filled(one) for name, one in value.items()}

    def total(self) -> int | None:
        """Return the number of all rows, None if that is not known."""
        counts = [self._count(shard) for shard in range(self.number)]
        known = [rows for rows in counts if rows is not None]
        return sum(known) if len(known) == self.number else None

    def count(self) -> int:
        """Read the stream to its end, and return the number of its rows."""
        return sum(map(len, self.tables(0)))

    def _count(self, shard: int) -> int | None:
        if shard not in self.known and self._parquet:
            with xopen(self._parquet[shard], "rb", download_config=self._access) as file:
                self.known[shard] = pq.read_metadata(file).num_rows
        return self.known.get(shard)


def _is_remote(value: dict[str, Any]) -> bool:
    """Whether this is an image or a video that is a file of a network."""
    is_empty_medium = value.keys() == {"bytes", "path"} and value["bytes"] is None
    return is_empty_medium and "://" in (value["path"] or "")
