"""What a run has done so far, safe against being killed at any moment.

A journal is a file of JSON lines, one journal for each rank. A batch is one line, written at once
and on disk before any caption leaves the program; a line that was cut short counts for nothing. So
a batch has happened as a whole or not at all, and the same batches are made again after a restart.

    {"run": {...}}                  the settings that captions depend on; the first line
    {"batch": [record, ...]}        captions are known; their text files may be written from here on
    {"placed": [name, ...]}         their text files are written
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from torchtune_qwen25vl._files import write_file

State = Literal["done", "skipped", "failed", "cut", "looped"]


@dataclass(frozen=True)
class Record:
    """How one image ended.

    Attributes:
        name: of the item
        state: done; skipped, as it had a caption; failed, for `reason`; cut, at the length
            limit; looped, repeating itself
        caption: the text as it is written out
        reason: of failed and skipped
        tokens: that the model answered with
        max_pixels: limit it was resized to
        steps: what had to be done to get there, such as halving a batch
        file: text file that the caption goes into, if any
    """

    name: str
    state: State
    caption: str = ""
    reason: str = ""
    tokens: int = 0
    max_pixels: int = 0
    steps: str = ""
    file: str = ""


@dataclass
class Past:
    """What the journals of a folder say.

    Attributes:
        run: the first line; None where nothing was begun
        records: the last one of each name
        unplaced: names whose text files may not be written yet
    """

    run: dict[str, Any] | None = None
    records: dict[str, Record] = field(default_factory=dict)
    unplaced: dict[str, None] = field(default_factory=dict)


def journals(folder: Path) -> list[Path]:
    """The journals of all ranks that wrote to this folder."""
    return sorted(folder.glob("journal-*.jsonl"))


def read_journals(folder: Path) -> Past:
    """Everything the journals of a folder say.

    Raises:
        ValueError: if one is damaged elsewhere than at its end.
    """
    past = Past()
    for path in journals(folder):
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                _take(past, json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}, is no record ({error}): mend the line, or start "
                    "again with restart=True"
                ) from error
    return past


def _whole_lines(path: Path) -> list[bytes]:
    *whole, _cut_short = path.read_bytes().split(b"\n")
    return whole


def _take(past: Past, entry: Mapping[str, Any]) -> None:
    if "run" in entry:
        past.run = entry["run"]
    for record in (Record(**values) for values in entry.get("batch", ())):
        past.records[record.name] = record
        past.unplaced[record.name] = None
    for name in entry.get("placed", ()):
        past.unplaced.pop(name, None)


def set_aside(folder: Path) -> None:
    """Rename the journals so that the next run starts anew; nothing is deleted."""
    for path in journals(folder):
        number = 1 + len(list(folder.glob(f"earlier-*-{path.name}")))
        path.rename(folder / f"earlier-{number}-{path.name}")


def merge_journals(folder: Path, past: Past) -> None:
    """Put what all ranks wrote into the first one's journal, every text file being in place."""
    lines: list[Mapping[str, Any]] = [
        {"run": past.run},
        {"batch": [asdict(record) for record in past.records.values()]},
        {"placed": list(past.records)},
    ]
    write_file(folder / "journal-0.jsonl", b"".join(map(_line, lines)))
    for path in journals(folder):
        if path.name != "journal-0.jsonl":
            path.unlink()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second run out of it until this one is done or dead.

    Raises:
        ValueError: if another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            # lockf, not flock: processes started from here must not inherit it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another run is at work in {folder}: wait for it, or choose another output_dir"
            ) from error
        yield


class Journal:
    """The journal of this rank, open to be added to.

    Args:
        folder: where it lies or will lie
        rank: of this process
        run: first line of a new journal
    """

    def __init__(self, folder: Path, rank: int, run: Mapping[str, Any]) -> None:
        path = folder / f"journal-{rank}.jsonl"
        self._file: BinaryIO = path.open("ab")
        size = sum(len(line) + 1 for line in _whole_lines(path))
        self._file.truncate(size)
        if size == 0:
            self._add({"run": run})
            _flush_folder(folder)

    def add(self, records: Iterable[Record]) -> None:
        """Write a batch; it is on disk when this returns."""
        self._add({"batch": [asdict(record) for record in records]})

    def placed(self, names: Sequence[str]) -> None:
        """Write that the text files of these names are on disk."""
        self._add({"placed": list(names)})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, entry: Mapping[str, Any]) -> None:
        self._file.write(_line(entry))
        self._file.flush()
        os.fsync(self._file.fileno())


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
