"""States of a run, opened to be read: those of our file, or of HALP's.

Shapes: n rows, t tokens of a span.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from torchtune_qwen25vl.hidden_states import _columns, _halp
from torchtune_qwen25vl.hidden_states._extra import needed
from torchtune_qwen25vl.hidden_states._layout import Header
from torchtune_qwen25vl.hidden_states._selectors import Selector, read_selectors
from torchtune_qwen25vl.hidden_states._table import FILE as TABLE
from torchtune_qwen25vl.hidden_states._table import read_table
from torchtune_qwen25vl.jobs import as_path

State = np.ndarray | Sequence[np.ndarray]


class States(Protocol):
    """States of all rows, in input order, with what is known of these.

    Attributes:
        ids: of the rows
        states: how each row ended, "done" or "failed"; of failed ones the states are nan
        reasons: why a row failed
        images: what the table calls the images of each row
        questions: what was asked
        truths: the answers of the table
        answers: those of the model
        rows: the other columns of the table
        selectors: that there are
        facts: what the file says of the run
    """

    selectors: list[str]
    facts: dict[str, str]

    @property
    def ids(self) -> list[str]: ...

    @property
    def states(self) -> list[str]: ...

    @property
    def reasons(self) -> list[str]: ...

    @property
    def images(self) -> list[str]: ...

    @property
    def questions(self) -> list[str]: ...

    @property
    def truths(self) -> list[str]: ...

    @property
    def answers(self) -> list[str]: ...

    @property
    def rows(self) -> list[dict[str, Any]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, selector: str) -> State:
        """Return states [n, width]; for spans that end in `all`, n arrays [t, width].

        Args:
            selector: in any of its forms, of one block

        Raises:
            ValueError: if it was not recorded.
        """


def open_states(folder: str | Path) -> States:
    """Open the states of a run, or a folder of HALP's files; nothing is read but what is asked for.

    Arrays of our file are memory-mapped, in the dtype of the run; bf16 is that of `ml_dtypes`.
    Arrays of HALP's files are read part by part, float32.

    Raises:
        ValueError: if the folder holds neither, or its files are damaged.
    """
    folder = as_path(str(folder))
    if (folder / _columns.FILE).is_file():
        if not (folder / TABLE).is_file():
            raise ValueError(
                f"{folder} has no {TABLE} yet: start its run again to go on to the end"
            )
        return ColumnStates(folder)
    if _halp.parts_of(folder):
        return _halp.HalpStates(folder)
    raise ValueError(f"{folder} holds no states: no {_columns.FILE}, and no part of HALP's form")


class ColumnStates:
    """States of our file; see `States`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._header = Header.read(folder / _columns.FILE)
        self.facts = dict(self._header.facts)
        blocks = int(self.facts["num_layers"]), int(self.facts["vision_num_layers"])
        self._blocks = {"num_layers": blocks[0], "vision_num_layers": blocks[1]}
        self.selectors: list[str] = json.loads(self.facts["selectors"])
        self._names = {self._selector(name): name for name in self.selectors}

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _entries(self) -> list[dict[str, Any]]:
        """The table, read when something of it is asked for.

        Raises:
            ValueError: if it is damaged, or of other rows than the states.
        """
        entries = read_table(self._folder)
        if [entry["id"] for entry in entries] != self._header.ids:
            raise ValueError(
                f"{self._folder / TABLE} has other rows than {_columns.FILE}: start the run again "
                "to go on to the end"
            )
        return entries

    @cached_property
    def ids(self) -> list[str]:
        """Of the rows."""
        return self._all("id")

    @cached_property
    def states(self) -> list[str]:
        """How each row ended."""
        return self._all("state")

    @cached_property
    def reasons(self) -> list[str]:
        """Why a row failed."""
        return self._all("reason")

    @cached_property
    def images(self) -> list[str]:
        """What the table calls the images of each row."""
        return self._all("image")

    @cached_property
    def questions(self) -> list[str]:
        """What was asked."""
        return self._all("question")

    @cached_property
    def truths(self) -> list[str]:
        """The answers of the table."""
        return self._all("truth")

    @cached_property
    def answers(self) -> list[str]:
        """The answers of the model."""
        return self._all("answer")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The other columns of the table."""
        return [entry["columns"] for entry in self._entries]

    def __getitem__(self, selector: str) -> State:
        name = self._names.get(self._selector(selector))
        if name is None:
            raise ValueError(
                f"{selector!r} was not recorded in {self._folder}, but {', '.join(self.selectors)}"
            )
        if name in self._header.arrays:
            return self._column(self._header.arrays[name])
        places = [entry["places"].get(name) for entry in self._entries]
        widths = json.loads(self.facts["widths"])
        return WholeSpans(self._folder, name, places, widths[name], _dtype(self.facts["dtype"]))

    def _all(self, key: str) -> list[str]:
        return [entry[key] for entry in self._entries]

    def _selector(self, text: str) -> Selector:
        read = read_selectors([text], **self._blocks)
        if len(read) > 1:
            raise ValueError(f"{text!r} asks for {len(read)} arrays; name one block")
        return next(iter(read.values()))

    def _column(self, entry: Mapping[str, Any]) -> np.ndarray:
        rows, width = entry["shape"]
        return np.memmap(
            self._folder / _columns.FILE,
            _dtype(entry["dtype"]),
            mode="r",
            offset=self._header.first + entry["data_offsets"][0],
            shape=(rows, width),
        )


class WholeSpans(Sequence[np.ndarray]):
    """States that are [t, width] for each row, memory-mapped; of rows that have none, t is 0."""

    def __init__(
        self,
        folder: Path,
        name: str,
        places: Sequence[Sequence[int] | None],
        width: int,
        dtype: np.dtype,
    ) -> None:
        self._folder, self._name, self._places = folder, name, places
        self._empty = np.empty((0, width), dtype)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        place = self._places[index]
        if place is None or place[2] == 0:
            return self._empty
        rank, first, count = place
        path = self._folder / _columns.whole_name(self._name, rank)
        size = self._empty.shape[1] * self._empty.dtype.itemsize
        if not path.is_file() or path.stat().st_size < (first + count) * size:
            raise ValueError(f"{path} is gone or cut short: put back a whole one")
        shape = count, self._empty.shape[1]
        return np.memmap(path, self._empty.dtype, mode="r", offset=first * size, shape=shape)


def _dtype(name: str) -> np.dtype:
    if name != "BF16":
        return np.dtype({"F32": np.float32, "F16": np.float16}[name])
    with needed("states in bf16"):
        import ml_dtypes
    return np.dtype(ml_dtypes.bfloat16)
