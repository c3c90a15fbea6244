"""Rows of a stream of `datasets`: read once a pass, in order, and never kept on disk.

A row has a place, as everywhere: the stream is read forward to it, and rows read last are held in
memory, so that they may be asked for in any order. One process reads, and hands rows to those that
prepare samples of them.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from torchtune.utils import get_logger, log_rank_zero

from torchtune_qwen25vl.media._rows import decoded, digest_of, without_media
from torchtune_qwen25vl.media._shards import Shards
from torchtune_qwen25vl.media._splits import only_piece, stretch

BUFFER = "shuffle_buffer_size"
WINDOW = 1000  # rows among which a stream is shuffled
READ = 64  # rows that are taken out of a file's table at a time
HASHED = 100  # rows whose content tells one stream from another


class StreamRows:
    """The rows of a stream, from one of them to another.

    Attributes:
        window: number of rows among which the stream is shuffled

    Args:
        source: name of the stream in errors
        shards: files of the stream
        window: number of rows among which the stream is shuffled
        first: number of the first row in the stream
        end: number behind the last one
    """

    def __init__(self, source: str, shards: Shards, *, window: int, first: int, end: int) -> None:
        self.window = window
        self._source, self._first, self._end = source, first, end
        self._shards: Any = shards
        features = shards.features
        self._features = features and datasets.Features(without_media(dict(features)))
        self._owner = os.getpid()
        self._reading: Iterator[dict[str, Any]] | None = None
        self._at = 0  # number of the row that is read next
        self._held: deque[dict[str, Any]] = deque()  # the rows before it
        self._handed: tuple[int, dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self._end - self._first

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a row: one that was handed over, one further on, or one of the first.

        Raises:
            ValueError: if it stands further back, or the stream cannot be read.
        """
        return decoded(self._stored(index), self._features)

    def column(self, name: str) -> list[Any]:
        """Refuse to read all rows for one column.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self._source}: {name!r} of all rows is needed at once, but a stream has them one "
            "after the other; leave streaming out"
        )

    def digest(self, index: int) -> str:
        return digest_of(repr(self._stored(index)).encode())

    def identity(self) -> str:
        """Return a short name of the stream: of its first rows, their number, and its files'."""
        digest = hashlib.sha256(f"{self._first} {self._end} {self._shards.number}".encode())
        for index in range(min(HASHED, len(self))):
            digest.update(repr(self.fetch(index, 0)).encode())
        return digest.hexdigest()[:16]

    def learned(self) -> dict[int, int]:
        """Return how many rows are in each file of which that is known."""
        return dict(self._shards.known)

    def learn(self, known: Mapping[int, int]) -> None:
        """Take over what another run has learned, which need not read to where it goes on."""
        self._shards.known |= known

    def fetch(self, index: int, since: int) -> dict[str, Any]:
        """Read a row as it is stored, and hold it and all from `since` on, to be read again.

        Args:
            index: number of the row
            since: number of the first row that may be asked for after it

        Raises:
            ValueError: if the stream cannot be read, or ends before the row.
        """
        if os.getpid() != self._owner:
            raise ValueError(
                f"{self._source}: the process that opened a stream reads it, and hands rows to "
                "its workers; this loader does not, so set its num_workers to 0"
            )
        if self._reading is None or index < self._at - len(self._held):
            self._at = since
            self._held.clear()
            self._reading = self._read(since)
        while self._at <= index:
            self._held.append(next(self._reading))
            self._at += 1
        while self._at - len(self._held) < since:
            self._held.popleft()
        return self._held[index - self._at]

    def hand(self, index: int, stored: dict[str, Any]) -> None:
        """Take a row that was fetched elsewhere; it is there until the next one comes."""
        self._handed = index, stored

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": None, "_reading": None, "_held": deque()}

    def _stored(self, index: int) -> dict[str, Any]:
        if self._handed is not None and self._handed[0] == index:
            return self._handed[1]
        if self.window <= index < self._at - len(self._held):
            raise ValueError(
                f"{self._source}: a stream is read in order, but row {index} is asked for after "
                f"row {self._at - 1}; set shuffle to False, take a recipe of this package, or "
                "leave streaming out"
            )
        return self.fetch(index, index)

    def _read(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield the rows from one on.

        Raises:
            ValueError: if the stream cannot be read, or ends too early.
        """
        try:
            shard, passed = self._shards.find(self._first + index)
            left = self._first + index - passed
            for table in self._shards.tables(shard):
                skipped = min(left, len(table))
                left -= skipped
                yield from map(self._shards.filled, table.slice(skipped).to_pylist())
        except Exception as error:  # whatever the way to it, or one of its files, makes fail
            raise ValueError(
                f"{self._source}: the stream cannot be read on, {error!r}; start again to go on "
                "from the last checkpoint"
            ) from error
        raise ValueError(
            f"{self._source}: the stream ends after {self._shards.total()} rows, but was said to "
            f"have {self._end}; lower the end of its split"
        )


def open_stream(
    source: str, split: str, *, shuffle_buffer_size: int = WINDOW, **options: Any
) -> StreamRows:
    """Open a stream of `datasets`.

    Its number of rows is what the info of its split tells, or else what the footers of its Parquet
    files do; files of this machine are read through and counted.

    Args:
        source: a hub id, or a builder name with `data_files`
        split: split, or a stretch of it
        shuffle_buffer_size: number of rows among which the stream is shuffled
        **options: passed on to `datasets.load_dataset`

    Raises:
        ValueError: if an argument cannot be, or the number of rows is not known and the split does
            not say it.
    """
    if type(shuffle_buffer_size) is not int or shuffle_buffer_size < 1:
        raise ValueError(
            f"{source}: {BUFFER} is a whole number from 1, got {shuffle_buffer_size!r}"
        )
    piece = only_piece(source, split)
    builder = datasets.load_dataset_builder(source, **options)
    try:
        stream = builder.as_streaming_dataset(split=piece.name)
    except ValueError as error:  # names the splits that there are
        raise ValueError(f"{source}: {error}") from error
    files = list((builder.config.data_files or {}).get(piece.name, ()))
    is_whole = builder.name == "parquet" and options.get("filters") is None
    in_tables = isinstance(builder, datasets.ArrowBasedBuilder)  # else each row orders its columns
    shards = Shards(
        stream,
        files if is_whole else (),
        datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options),
        at_once=READ if in_tables else 1,
    )
    rows = _told(builder.info, piece.name, options)
    if rows is None:
        rows = shards.total()
    if rows is None and not piece.is_plain and all(map(os.path.isfile, files)):
        log_rank_zero(get_logger("INFO"), f"{source}: counting the rows of {len(files)} files")
        rows = shards.count()
    first, end = stretch(source, piece, rows)
    return StreamRows(source, shards, window=shuffle_buffer_size, first=first, end=end)


def _told(info: datasets.DatasetInfo, split: str, options: Mapping[str, Any]) -> int | None:
    """Return how many rows the info of a data set says that a split has; None if it is silent."""
    is_narrowed = any(options.get(name) for name in ("data_files", "data_dir", "filters"))
    told = None if is_narrowed else (info.splits or {}).get(split)
    return told.num_examples or None if told else None
