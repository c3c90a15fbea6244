"""What a file of states holds: its header, planned before a run and read after it."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchtune_qwen25vl.hidden_states._selectors import Selector

FORMAT = "1"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Layout:
    """What the file of a run holds.

    Attributes:
        ids: of the rows, in order
        selectors: by name, as they were asked for
        widths: length of a vector of each
        dtype: of the run
        facts: texts for the header: model, number of blocks, what a block's state is
    """

    ids: Sequence[str]
    selectors: Mapping[str, Selector]
    widths: Mapping[str, int]
    dtype: torch.dtype
    facts: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> bytes:
        """Return the beginning of the file: the length of the header, and the header."""
        facts = {"format": FORMAT, **self.facts, "ids": json.dumps(list(self.ids))}
        entries: dict[str, Any] = {"__metadata__": facts}
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
    def rows(self) -> int:
        """Number of rows."""
        return len(self.ids)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        data = sum(self.rows * self.row_bytes(name) for name in self.starts())
        return len(self.header()) + data


@dataclass(frozen=True)
class Header:
    """The header of a file of states.

    Attributes:
        content: the beginning of the file, up to the data
        arrays: dtype, shape and data_offsets of each, by selector
        facts: texts about the run
    """

    content: bytes
    arrays: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, str]

    @classmethod
    def of(cls, content: bytes) -> "Header":
        """Parse the beginning of a file."""
        arrays = json.loads(content[8:])
        return cls(content, arrays, arrays.pop("__metadata__", {}))

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Read the header of a file.

        Raises:
            ValueError: if the file is damaged or cut short.
        """
        try:
            with path.open("rb") as file:
                start = file.read(8)
                (length,) = struct.unpack("<Q", start)
                header = cls.of(start + file.read(min(length, path.stat().st_size)))
            end = max((array["data_offsets"][1] for array in header.arrays.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ValueError(f"{path} is damaged ({error}): put back a whole one") from error
        if path.stat().st_size != header.first + end:
            raise ValueError(f"{path} is cut short: put back a whole one")
        return header

    @property
    def first(self) -> int:
        """Where the data begins."""
        return len(self.content)

    @property
    def starts(self) -> dict[str, int]:
        """Where each array begins, behind the header."""
        return {name: array["data_offsets"][0] for name, array in self.arrays.items()}

    @property
    def ids(self) -> list[str]:
        """The rows, in order."""
        return json.loads(self.facts["ids"])

    @property
    def kind(self) -> Any:
        """Everything but the rows."""
        facts = {name: text for name, text in self.facts.items() if name != "ids"}
        return facts, {name: (a["dtype"], a["shape"][1:]) for name, a in self.arrays.items()}
