"""Rows made of other rows: some of them, or several sets one after the other."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from torchtune_qwen25vl.media._rows import Rows


class JoinedRows:
    """Several sets of rows, one after the other.

    Args:
        parts: the sets
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._firsts = [*accumulate(map(len, parts), initial=0)]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, own = self._find(index)
        return rows[own]

    def column(self, name: str) -> list[Any]:
        return [value for part in self._parts for value in part.column(name)]

    def digest(self, index: int) -> str:
        rows, own = self._find(index)
        return rows.digest(own)

    def _find(self, index: int) -> tuple[Rows, int]:
        part = bisect_right(self._firsts, index) - 1
        return self._parts[part], index - self._firsts[part]


class SelectedRows:
    """Some rows of a set, in an order of their own.

    Args:
        rows: the set
        chosen: their numbers, [n]
    """

    def __init__(self, rows: Rows, chosen: np.ndarray) -> None:
        self._rows, self._chosen = rows, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(self._chosen[index])]

    def column(self, name: str) -> list[Any]:
        values = self._rows.column(name)
        return [values[row] for row in self._chosen]

    def digest(self, index: int) -> str:
        return self._rows.digest(int(self._chosen[index]))
