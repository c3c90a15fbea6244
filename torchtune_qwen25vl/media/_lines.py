"""JSON lines of any size: read from their file one by one, found by where each begins."""

import codecs
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchtune_qwen25vl.media._rows import digest_of, parse_row, value_of
from torchtune_qwen25vl.media._stored import StoredFile


class LineRows:
    """The lines of a file, each a row, of which 8 bytes are held; empty lines are none.

    Args:
        file: the file
        starts: where each row begins, and where the last one ends, in bytes, [rows + 1]
    """

    def __init__(self, file: StoredFile, starts: np.ndarray) -> None:
        self._file, self._starts = file, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return parse_row(self._stored(index))

    def column(self, name: str) -> list[Any]:
        with self._file.open() as file:
            return [value_of(self._read(file, index), name) for index in range(len(self))]

    def digest(self, index: int) -> str:
        return digest_of(self._stored(index))

    def _stored(self, index: int) -> bytes:
        with self._file.open() as file:
            return self._read(file, index)

    def _read(self, file: BinaryIO, index: int) -> bytes:
        start, end = self._starts[index : index + 2].tolist()
        file.seek(start)
        return self._text(file.read(end - start))

    def _text(self, content: bytes) -> bytes:
        """Return the JSON text of a row that a stretch of the file holds."""
        return content.partition(b"\n")[0]  # not the empty lines behind it


def find_lines(path: Path) -> LineRows | None:
    """Find where the lines of a file begin; None if a line holds a list, thus several rows."""
    stored, starts = StoredFile.found(path), array("q")
    with stored.open() as file:
        at = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(at)
        for line in file:
            if begun := line.lstrip()[:1]:
                starts.append(at)
            if begun == b"[":
                return None
            at += len(line)
    starts.append(at)
    return LineRows(stored, np.array(starts, dtype=np.int64))
