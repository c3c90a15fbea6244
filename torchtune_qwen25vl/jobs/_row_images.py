"""An image inside a row of a table, and what the row says of it beside."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.media import Rows


@dataclass(frozen=True)
class RowImage:
    """An image that lies inside a row of a table and is read when its turn comes.

    Attributes:
        rows: of the table
        index: number of the row
        column: that holds or names the image
        folder: of the table, from which relative paths start
    """

    rows: Rows
    index: int
    column: str
    folder: Path

    def read(self) -> Any:
        """Return the image, undecoded, or where it lies.

        Raises:
            ValueError: if the row has none, or is damaged.
        """
        stored = self.stored()
        if isinstance(stored, dict) and stored.get("bytes") is None:
            stored = stored.get("path", stored)
        if isinstance(stored, str) and ":" not in stored:  # neither a URL nor C:/
            return os.path.join(self.folder, stored)
        return stored

    def stored(self) -> Any:
        """Return the image as it is stored, undecoded.

        Raises:
            ValueError: if the row has none, or is damaged.
        """
        row = self.rows[self.index]
        if row.get(self.column) is None:
            raise ValueError(f"the row has no {self.column!r}, it has {sorted(row)}")
        return row[self.column]

    def others(self) -> dict[str, Any]:
        """Return the other columns of the row, as far as JSON can hold them."""
        try:
            row = self.rows[self.index]
        except ValueError:
            return {}
        return {key: value for key, value in row.items() if key != self.column and is_json(value)}


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
