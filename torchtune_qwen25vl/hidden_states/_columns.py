"""States on disk: one array [n, width] for each selector, in the dtype of the run, in input order.

All arrays lie in one safetensors file, whose header is written first: states of a row go to their
places as they come, so that nothing is copied afterwards and a killed run goes on in the same file.
They are not written through a memory map, in which a full disk would be a crash.

States of spans that are [n, width] for each row (`image_all`, `all`) have no place before they are
there: they are added to a file for each selector and rank, and the journal says where they are.

Shapes: n rows of the table, t tokens of a span.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.hidden_states._layout import Header, Layout

FILE = "states.safetensors"
WHOLE = "spans-"  # begins the names of files of whole spans


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


def make_file(folder: Path, layout: Layout, kept: Collection[str]) -> None:
    """Make the file of a run, whose arrays are holes as yet, or see that the one there is right.

    Where the table has other rows than before, states go to where their rows are now. What another
    run has left is renamed; nothing is deleted.

    Args:
        folder: of the run
        layout: what the file is to hold
        kept: rows whose states are there already

    Raises:
        ValueError: if there are to be some, and the file is gone, damaged, or another one.
    """
    path = folder / FILE
    if not kept:
        _make_new(folder, layout)
        return
    if not path.is_file():
        raise ValueError(f"{path} is gone: put it back, or start anew with restart=True")
    there = Header.read(path)
    if there.content == layout.header():
        return
    if there.kind != Header.of(layout.header()).kind:
        raise ValueError(
            f"{path} is not what this run began: put it back, or start anew with restart=True"
        )
    _move_rows(path, there, layout, kept)


def _make_new(folder: Path, layout: Layout) -> None:
    path, header = folder / FILE, layout.header()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(header)) == header and path.stat().st_size == layout.size:
                return
        number = 1 + len(list(folder.glob(f"earlier-*-{FILE}")))
        for old in [path, folder / "rows.jsonl", *folder.glob(f"{WHOLE}*")]:
            if old.exists():
                old.rename(folder / f"earlier-{number}-{old.name}")
    write_file(path, header)
    os.truncate(path, layout.size)


def _move_rows(path: Path, there: "Header", layout: Layout, kept: Collection[str]) -> None:
    """Put a file of the new layout in the place of one that has the same arrays of other rows."""
    before = {name: number for number, name in enumerate(there.ids)}
    moved = [(before[name], number) for number, name in enumerate(layout.ids) if name in kept]
    hidden = path.with_name(f".{path.name}.part")
    with hidden.open("wb") as file, path.open("rb") as old:
        file.write(layout.header())
        file.truncate(layout.size)
        for name, start in layout.starts().items():
            size, first = layout.row_bytes(name), there.first + there.starts[name]
            for source, target in moved:
                old.seek(first + source * size)
                file.seek(len(layout.header()) + start + target * size)
                file.write(old.read(size))
        file.flush()
        os.fsync(file.fileno())
    os.replace(hidden, path)


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
