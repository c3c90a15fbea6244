"""Tables in text, CSV and TSV with a header: held in memory, or read from their file by place."""

import csv
import io
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from torchtune_qwen25vl.media._compressed import content_or_file, suffix_within
from torchtune_qwen25vl.media._lines import LineRows
from torchtune_qwen25vl.media._rows import EXTRA_FIELDS, JsonRows, Rows, json_texts
from torchtune_qwen25vl.media._stored import StoredFile

BOM = "\ufeff"


class TableRows(LineRows):
    """The records of a table, each a row, of which 8 bytes are held.

    Args:
        file: the file
        dialect: dialect of `csv`
        header: names of the columns
        starts: where each record begins, and where the last one ends, in bytes, [rows + 1]
    """

    def __init__(
        self, file: StoredFile, dialect: str, header: Sequence[str], starts: np.ndarray
    ) -> None:
        super().__init__(file, starts)
        self._dialect, self._header = dialect, header

    def _text(self, content: bytes) -> bytes:
        """Return the JSON text of a row, as `JsonRows` would have it."""
        lines = io.StringIO(content.decode(), newline="")
        reader = csv.DictReader(
            lines, self._header, restkey=EXTRA_FIELDS, dialect=self._dialect, strict=True
        )
        return next(json_texts([next(reader)]))


def read_table(path: Path, most: int) -> Rows:
    """Read a table, which may be compressed; one of more bytes than `most` is not held.

    Raises:
        ValueError: naming the file, if a field is not quoted as it should be.
    """
    dialect = "excel-tab" if suffix_within(path) == ".tsv" else "excel"
    content = content_or_file(path, most)
    if isinstance(content, Path):
        return _find_records(content, dialect, path)
    with io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, dialect=dialect, restkey=EXTRA_FIELDS, strict=True)
        try:
            return JsonRows(json_texts(reader))
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


class _Lines:
    """The lines of a file, and where the next one begins, in bytes."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.end = file, 0

    def __iter__(self) -> Iterator[str]:
        for line in self._file:
            self.end += len(line.encode())
            yield line.removeprefix(BOM) if self.end == len(line.encode()) else line


def _find_records(path: Path, dialect: str, source: Path) -> TableRows:
    """Find where the records of a table begin; a quoted field may have several lines."""
    stored, starts = StoredFile.found(path), array("q")
    with io.TextIOWrapper(stored.open(), encoding="utf-8", newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, dialect, strict=True)
        try:
            header, begin = next(reader, []), lines.end
            for record in reader:
                if record:  # an empty line is none
                    starts.append(begin)
                begin = lines.end
        except csv.Error as error:
            raise ValueError(f"{source}, after line {reader.line_num}: {error}") from error
    starts.append(lines.end)
    return TableRows(stored, dialect, header, np.array(starts, dtype=np.int64))
