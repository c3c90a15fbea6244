"""What a run has done so far, safe against being killed at any moment.

A journal is a file of JSON lines, one journal for each rank. Items that ended together are one
line, written at once and flushed to disk; a line that was cut short counts for nothing. So they
have ended all or none, and none is done twice. Of several records of one name the last one counts.

    {"format": 2, "run": {...}}     what the results depend on; the first line
    {"batch": [record, ...]}        how these items ended

A record is a frozen dataclass of the job's own, whose values JSON can hold.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Generic, Protocol, TypeVar

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl._lock import locked

logger = logging.getLogger(__name__)
FORMAT = 2  # of journals; those of other formats are refused


class Recorded(Protocol):
    """How one item ended: its name, and a state, of which every job has "failed"."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    @property
    def state(self) -> str: ...


R = TypeVar("R", bound=Recorded)


@dataclass(frozen=True)
class Run:
    """What the results of a run depend on.

    Attributes:
        settings: those that decide; where they differ it is another run
        max_pixels: limit of an image, by the memory that was free when the run began
        batch_tokens: limit of a batch, likewise
        format: of the weights in memory; None while the model has not been fetched
        weights: digest of names, sizes and times of the model's files; empty likewise
    """

    settings: Mapping[str, Any]
    max_pixels: int
    batch_tokens: int
    format: str | None
    weights: str = ""


@dataclass
class Past(Generic[R]):
    """What the journals of a folder say.

    Attributes:
        run: of the first line; None where nothing was begun
        records: the last one of each name
    """

    run: Run | None = None
    records: dict[str, R] = field(default_factory=dict)


def read_journals(folder: Path, record: type[R]) -> Past[R]:
    """Read the journals of all ranks that wrote to a folder.

    Args:
        folder: output folder of the run
        record: class of the job's records

    Raises:
        ValueError: if one is damaged elsewhere than at its end, or is of another format.
    """
    past = Past[R]()
    for path in _journals(folder):
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                entry = json.loads(line)
                if number == 1:
                    past.run = Run(**_current(entry)["run"])
                else:
                    records = [record(**values) for values in entry["batch"]]
                    past.records |= {one.name: one for one in records}
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}, cannot be read ({error!r}): mend the line, or start "
                    "again with restart=True"
                ) from error
    return past


def take_up(
    folder: Path,
    record: type[R],
    run: Run,
    *,
    complete: Callable[[R], R],
    restart: bool,
    dry_run: bool,
) -> Past[R]:
    """Find out what this run has done before; the journals of all ranks become one.

    The journals of another run are renamed, so that this one starts anew; nothing is deleted. A run
    in which nothing but failures came about binds nobody to its limits and its format.

    Args:
        folder: output folder, claimed unless `dry_run`
        record: class of the job's records
        run: what the results depend on now
        complete: finishes what a killed run left half done for a record; returns the record
        restart: whether what is there counts as another run
        dry_run: whether everything on disk stays as it is

    Returns:
        The run as it was begun, with its records; `run` without records where none was begun.

    Raises:
        ValueError: if a journal cannot be read, or the weights were in another format.
    """
    new = Past[R](run)
    if restart:
        if not dry_run:
            _set_aside(folder)
        return new
    past = read_journals(folder, record)
    if past.run is None:
        return new
    is_same = past.run.settings == run.settings and run.weights in ("", past.run.weights)
    if all(one.state in ("failed", "skipped") for one in past.records.values()):
        is_same = is_same and run.format in (None, past.run.format)
        past.run = run if is_same and run.format is not None else past.run
    elif is_same and run.format not in (None, past.run.format):
        raise ValueError(
            f"{folder} holds a run in {past.run.format} and this one would be in {run.format}: "
            "set dtype and four_bit as before, or restart=True"
        )
    if not dry_run:
        past.records = {name: complete(one) for name, one in past.records.items()}
        _merge(folder, past)
        if not is_same:
            _set_aside(folder)
    return past if is_same else new


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, and keep a second run out of it until this one is done or dead.

    Raises:
        ValueError: if another run is at work there.
    """
    if not folder.is_dir():
        folder.mkdir(parents=True)
        logger.info("made %s, where no run was before", folder)
    with locked(folder / "lock") as is_ours:
        if not is_ours:
            raise ValueError(
                f"another run is at work in {folder}: wait for it, or choose another output_dir"
            )
        yield


class Journal(Generic[R]):
    """The journal of this rank, open to be added to.

    Args:
        folder: where it lies or will lie
        rank: of this process
        run: first line of a new journal
    """

    def __init__(self, folder: Path, rank: int, run: Run) -> None:
        self._path = folder / f"journal-{rank}.jsonl"
        self._file: BinaryIO = self._path.open("ab")
        size = sum(len(line) + 1 for line in _whole_lines(self._path))
        self._file.truncate(size)
        if size == 0:
            self._add(_header(run))
            _flush_folder(folder)

    def add(self, records: Sequence[R]) -> None:
        """Write a batch, if it is not empty; it is on disk when this returns.

        Raises:
            ValueError: if the file is gone, or another one lies in its place.
        """
        if records:
            self._check_place()
            self._add(_batch(records))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _check_place(self) -> None:
        """Notice that a folder was removed or a drive has vanished: the open file would not."""
        is_there = self._path.exists() and os.path.samestat(
            os.stat(self._path), os.fstat(self._file.fileno())
        )
        if not is_there:
            raise ValueError(
                f"{self._path} is gone: put its folder back and start again to go on, or start "
                "anew without it"
            )

    def _add(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(entry))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal-*.jsonl"))


def _whole_lines(path: Path) -> list[bytes]:
    *whole, _cut_short = path.read_bytes().split(b"\n")
    return whole


def _current(header: Mapping[str, Any]) -> Mapping[str, Any]:
    if "run" in header and header.get("format") != FORMAT:
        raise ValueError(
            f"its format is {header.get('format', 1)}, not {FORMAT}: another version's"
        )
    return header


def _set_aside(folder: Path) -> None:
    for path in _journals(folder):
        number = 1 + len(list(folder.glob(f"earlier-*-{path.name}")))
        path.rename(folder / f"earlier-{number}-{path.name}")


def _merge(folder: Path, past: Past[R]) -> None:
    assert past.run is not None
    lines = [_header(past.run), _batch(list(past.records.values()))]
    write_file(folder / "journal-0.jsonl", b"".join(map(_line, lines)))
    for path in _journals(folder):
        if path.name != "journal-0.jsonl":
            path.unlink()


def _header(run: Run) -> dict[str, Any]:
    return {"format": FORMAT, "run": asdict(run)}


def _batch(records: Sequence[R]) -> dict[str, Any]:
    return {"batch": [asdict(record) for record in records]}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
