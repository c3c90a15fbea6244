"""Splits: train, train[:95%], train[100:200], train[:10%]+train[-5%:], for every kind of rows.

The grammar is that of `datasets`. A share is rounded to whole rows at its border, and -5% is the
border at 95%, so that train[:95%] and train[95%:], or train[-5%:], have every row once.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torchtune_qwen25vl.media._rows import Rows
from torchtune_qwen25vl.media._selected import JoinedRows, SelectedRows

ONLY = "train"  # the only split of a file
_BORDER = r"-?\d+(?:\.\d+)?%|-?\d[\d_]*"
_PIECE = re.compile(rf"(\w+(?:\.\w+)*)(?:\[({_BORDER})?:({_BORDER})?\])?")


@dataclass(frozen=True)
class Piece:
    """Some rows of a split.

    Attributes:
        name: name of the split
        first: border before its first row, as it is written; empty for none
        end: border behind its last row
    """

    name: str
    first: str
    end: str

    def __str__(self) -> str:
        return f"{self.name}[{self.first}:{self.end}]"

    @property
    def is_plain(self) -> bool:
        """Whether it lies between two numbers, so that nobody need know how long the split is."""
        return all(re.fullmatch(r"\d[\d_]*", text) for text in (self.first or "0", self.end))

    def borders(self, rows: int) -> tuple[int, int]:
        """Return the number of its first row, and that behind its last, of a split of so many."""
        first = _border(self.first, rows) if self.first else 0
        return first, _border(self.end, rows) if self.end else rows


def rows_of_split(source: str, split: str, load: Callable[[str], Rows]) -> Rows:
    """Return the rows that a split names.

    Args:
        source: name of the rows in errors
        split: name, or name and slice, or several of these joined by +
        load: opens the rows of a split by its name

    Raises:
        ValueError: if it cannot be read so, or a piece of it has no row.
    """
    chosen: list[Rows] = []
    for piece in _pieces(source, split):
        rows = load(piece.name)
        is_whole = not (piece.first or piece.end)
        chosen.append(rows if is_whole else SelectedRows(rows, _chosen(source, piece, len(rows))))
    return chosen[0] if len(chosen) == 1 else JoinedRows(chosen)


def numbers_of_split(source: str, split: str | None, rows: int) -> np.ndarray:
    """Return the numbers of the rows that a split names, where all there are is one split.

    Raises:
        ValueError: as `rows_of_split`, and if it names another than "train".
    """
    pieces = _pieces(source, ONLY if split is None else split)
    if others := sorted({piece.name for piece in pieces} - {ONLY}):
        raise ValueError(f"{source} is one split, called {ONLY}, got {', '.join(others)}")
    return np.concatenate([_chosen(source, piece, rows) for piece in pieces])


def only_piece(source: str, split: str) -> Piece:
    """Return the piece that a split of a stream is.

    Raises:
        ValueError: as `rows_of_split`, and if there are several pieces.
    """
    piece, *others = _pieces(source, split)
    if others:
        raise ValueError(
            f"{source}: a stream is one stretch of a split, got {split!r}; list the pieces as "
            "parts of a mixture"
        )
    return piece


def stretch(source: str, piece: Piece, rows: int | None) -> tuple[int, int]:
    """Return the number of the first row of a piece, and that behind its last.

    Args:
        source: name of the rows in errors
        piece: piece of a split
        rows: number of the rows in the split; None if it is not known

    Raises:
        ValueError: if the piece has no rows, or needs to know how many the split has.
    """
    if rows is None:
        if not piece.is_plain:
            raise ValueError(
                f"{source}: nothing tells how many rows the stream has, so its split says which "
                f"are a pass, as {piece.name}[:100000] does, got {piece}"
            )
        rows = int(piece.end)
    first, end = piece.borders(rows)
    if rows and first >= end:
        raise ValueError(
            f"{source}: {piece} has none of the {rows} rows of {piece.name}; widen the split"
        )
    return first, end


def _chosen(source: str, piece: Piece, rows: int) -> np.ndarray:
    return np.arange(*stretch(source, piece, rows))


def _pieces(source: str, split: str) -> list[Piece]:
    found = [_PIECE.fullmatch(piece.strip()) for piece in split.split("+")]
    pieces = [Piece(*(match.groups(default=""))) for match in found if match]
    if len(pieces) < len(found):
        raise ValueError(
            f"{source}: a split is a name, or parts of it such as train[:95%], train[100:200] or "
            f"train[:10%]+train[-5%:], got {split!r}"
        )
    return pieces


def _border(text: str, rows: int) -> int:
    """Return before which row a border lies."""
    if text.endswith("%"):
        share = float(text[:-1])
        if abs(share) > 100:
            raise ValueError(f"a split has shares from -100% to 100%, got {text}")
        border = round((100 + share if share < 0 else share) * rows / 100)
    else:
        number = int(text)
        border = rows + number if number < 0 else number
    return min(max(border, 0), rows)
