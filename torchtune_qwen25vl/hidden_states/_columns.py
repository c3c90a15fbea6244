"""States on disk: one array [n, width] for each selector, in the dtype of the run, in input order.

All arrays lie in one safetensors file, whose header is written first: states of a row go to their
places as they come, so that nothing is copied afterwards and a killed run goes on in the same file.
They are not written through a memory map, in which a full disk would be a crash.

States of spans that are [n, width] for each row (`image_all`, `all`) have no place before they are
there: they are added to a file for each selector and rank, and the journal says where they are.

Shapes: n rows of the table, t tokens of a span.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.hidden_states._selectors import Selector

FILE = "states.safetensors"
FORMAT = "1"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Layout:
    """What the file of a run holds.

    Attributes:
        rows: number of rows
        selectors: by name, as they were asked for
        widths: length of a vector of each
        dtype: of the run
        facts: texts for the header: model, number of blocks, what a block's state is
    """

    rows: int
    selectors: Mapping[str, Selector]
    widths: Mapping[str, int]
    dtype: torch.dtype
    facts: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the beginning of the file: the length of the header, and the header."""
        entries: dict[str, Any] = {"__metadata__": {"format": FORMAT, **self.facts}}
        for name, start in self.starts().items():
            shape = [self.rows, self.widths[name]]
            end = start + self.rows * self.row_bytes(name)
            entries[name] = {
                "dtype": DTYPES[self.dtype],
                "shape": shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def starts(self) -> dict[str, int]:
        """Return where each array begins, behind the header."""
        starts, end = {}, 0
        for name, selector in self.selectors.items():
            if not selector.is_whole:
                starts[name] = end
                end += self.rows * self.row_bytes(name)
        return starts

    def row_bytes(self, name: str) -> int:
        """Return the bytes of one vector."""
        return self.widths[name] * self.dtype.itemsize

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        data = sum(self.rows * self.row_bytes(name) for name in self.starts())
        return len(self.header()) + data


class Columns:
    """The states of a run, open to be written by one rank; ranks write different rows.

    Args:
        folder: of the run
        layout: what its file holds
        rank: of this process
        ends: for selectors of whole spans, how many vectors of this rank count

    Raises:
        ValueError: if the folder holds states of another layout.
    """

    def __init__(
        self, folder: Path, layout: Layout, rank: int, ends: Mapping[str, int] | None = None
    ) -> None:
        self._layout, self._rank = layout, rank
        self._starts = layout.starts()
        self._first = len(layout.header())
        self._file: BinaryIO = (folder / FILE).open("r+b", buffering=0)
        self._whole = {
            name: _open_at(folder / whole_name(name, rank), (ends or {}).get(name, 0), layout, name)
            for name, selector in layout.selectors.items()
            if selector.is_whole
        }

    def write(
        self, numbers: Sequence[int], states: Mapping[str, Sequence[Tensor]]
    ) -> list[dict[str, list[int]]]:
        """Write the states of rows; they are on disk when this returns.

        Args:
            numbers: of the rows
            states: by selector, for each of these rows [width] or [t, width]

        Returns:
            For each row, the places of its whole spans: rank, first vector, number of vectors.

        Raises:
            OSError: if the disk is full.
        """
        places: list[dict[str, list[int]]] = [{} for _ in numbers]
        for name, vectors in states.items():
            for number, place, vector in zip(numbers, places, vectors, strict=True):
                if name in self._whole:
                    place[name] = [self._rank, *self._append(name, vector)]
                else:
                    self._write_row(name, number, _bytes(vector))
        self._flush()
        return places

    def write_absent(self, numbers: Sequence[int]) -> None:
        """Write nan as the states of rows that have failed."""
        for name in self._starts:
            absent = _bytes(
                torch.full((self._layout.widths[name],), torch.nan).to(self._layout.dtype)
            )
            for number in numbers:
                self._write_row(name, number, absent)
        if numbers:
            self._flush()

    def close(self) -> None:
        """Close the files."""
        for file in (self._file, *self._whole.values()):
            file.close()

    def _write_row(self, name: str, number: int, content: bytes) -> None:
        size = self._layout.row_bytes(name)
        assert len(content) == size
        _write(self._file, content, self._first + self._starts[name] + number * size)

    def _append(self, name: str, vectors: Tensor) -> tuple[int, int]:
        file, size = self._whole[name], self._layout.row_bytes(name)
        end = file.seek(0, os.SEEK_END)
        _write(file, _bytes(vectors), end)
        return end // size, len(vectors)

    def _flush(self) -> None:
        for file in (self._file, *self._whole.values()):
            os.fsync(file.fileno())


def make_file(folder: Path, layout: Layout, *, is_new: bool) -> None:
    """Make the file of a run, whose arrays are holes as yet, unless it goes on with the one there.

    What another run has left is renamed; nothing is deleted.

    Args:
        folder: of the run
        layout: what the file is to hold
        is_new: whether no states of this run are there

    Raises:
        ValueError: if there are to be some, and the file is gone or is another one.
    """
    path, header = folder / FILE, layout.header()
    is_there = path.is_file()
    if is_there:
        with path.open("rb") as file:
            is_same = file.read(len(header)) == header and path.stat().st_size == layout.size
    if not is_new and not (is_there and is_same):
        what = "is not what this run began" if is_there else "is gone"
        raise ValueError(f"{path} {what}: put it back, or start anew with restart=True")
    if is_there and not is_same:
        _set_aside(folder)
    if not (is_there and is_same):
        write_file(path, header)
        os.truncate(path, layout.size)


def _set_aside(folder: Path) -> None:
    number = 1 + len(list(folder.glob(f"earlier-*-{FILE}")))
    for path in [folder / FILE, folder / "rows.jsonl", *folder.glob(f"{WHOLE}*")]:
        if path.exists():
            path.rename(folder / f"earlier-{number}-{path.name}")


WHOLE = "spans-"


def whole_name(name: str, rank: int) -> str:
    """Return the file of a selector whose states are [t, width]."""
    return f"{WHOLE}{name.replace('/', '-')}-{rank}.bin"


def _open_at(path: Path, vectors: int, layout: Layout, name: str) -> BinaryIO:
    """Open a file to be added to behind so many vectors.

    Raises:
        ValueError: if it holds fewer.
    """
    path.touch()
    file = path.open("r+b", buffering=0)
    end = vectors * layout.row_bytes(name)
    if file.seek(0, os.SEEK_END) < end:
        file.close()
        raise ValueError(f"{path} is cut short: put it back, or start anew with restart=True")
    file.truncate(end)
    return file


def _write(file: BinaryIO, content: bytes, start: int) -> None:
    file.seek(start)
    view = memoryview(content)
    while view:  # a disk that is nearly full takes a part
        view = view[file.write(view) :]


def _bytes(vectors: Tensor) -> bytes:
    plain: np.ndarray = vectors.contiguous().view(torch.uint8).numpy()
    return plain.tobytes()
