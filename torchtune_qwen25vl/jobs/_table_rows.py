"""Rows of tables that have a text and images, with everything that the files will keep of them.

A column is found by the names in use for it, which are the job's, unless the settings name another:

    id        or else the number of the row, from 0
    image     files, or images inside the table; lists too
    text      what the job asks: question, prompt
    answer    what the table says to it
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.jobs._paths import as_path
from torchtune_qwen25vl.jobs._row_images import is_json
from torchtune_qwen25vl.media import SUFFIXES, Rows, locate, open_rows

Names = Mapping[str, Sequence[str]]  # of columns that hold id, image, text and answer
SAVED_DATASET = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Held:
    """An image inside a row of a table, read when its turn comes."""

    rows: Rows
    index: int
    column: str
    place: int | None  # in a list

    def read(self) -> Any:
        """Return the image as it is stored, undecoded."""
        value = self.rows[self.index][self.column]
        return value if self.place is None else value[self.place]


@dataclass(frozen=True)
class Row:
    """One row: a text, and images.

    Attributes:
        name: its id
        number: of the row among all inputs, from 0
        text: what is asked
        truth: the answer that the table has
        image_id: what the table calls its images
        columns: all other columns, as the table has them
        sources: of its images: files, or what holds them
        problem: why it cannot be worked on, found while reading the table
    """

    name: str
    number: int
    text: str = ""
    truth: str = ""
    image_id: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Path | Held, ...] = ()
    problem: str = ""

    def stamp(self) -> str:
        """Describe the state of its files by size and time; one that is not there has none."""
        return ", ".join(_stamp(source) for source in self.sources if isinstance(source, Path))


def _stamp(path: Path) -> str:
    try:
        stat = os.stat(path)
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def read_rows(
    tables: Sequence[str],
    *,
    names: Names,
    images_dir: str | None,
    columns: Mapping[str, str | None],
    needs_text: bool = True,
) -> list[Row]:
    """Read the rows of all tables; one that is damaged is there, with its problem.

    Args:
        tables: .csv, .tsv, .json, .jsonl or .parquet files, or folders that `datasets` saved
        names: of columns in use for id, image, text and answer, the first that is there
        images_dir: folder that relative paths of images start from; None for the table's own
        columns: name of the column of each of `names`; None for those in use
        needs_text: whether a row without a text is one that cannot be worked on

    Raises:
        ValueError: if a table cannot be read, or lacks a column.
    """
    rows: list[Row] = []
    for table in tables:
        path = as_path(table)
        opened = _open(path, names)
        kept = [_kept(opened, index) for index in range(len(opened))]
        named = _find_columns(kept, table, names, columns)
        root = as_path(images_dir) if images_dir else path if path.is_dir() else path.parent
        rows += [
            _row(one, named, root.absolute(), len(rows) + k, needs_text)
            for k, one in enumerate(kept)
        ]
    if not rows:
        raise ValueError(f"there are no rows in {', '.join(tables)}")
    return list(_unique(rows))


def _open(path: Path, names: Names) -> Rows:
    is_table = path.is_file() or any((path / name).is_file() for name in SAVED_DATASET)
    if not is_table:
        what = "is a folder, and none that `datasets` saved" if path.is_dir() else "does not exist"
        raise ValueError(f"an input is a table of {names['text'][0]}s, {path} {what}")
    return open_rows(str(path))


def _kept(rows: Rows, index: int) -> dict[str, Any] | str:
    """Return a row whose images are left where they are; of a damaged one, why it is."""
    try:
        row = rows[index]
    except ValueError as error:
        return str(error)
    return {name: _lightened(value, rows, index, name) for name, value in row.items()}


def _lightened(value: Any, rows: Rows, index: int, name: str) -> Any:
    if _is_image(value):
        return Held(rows, index, name, None)
    if isinstance(value, list) and any(map(_is_image, value)):
        return [Held(rows, index, name, k) if _is_image(v) else v for k, v in enumerate(value)]
    return value


def _is_image(value: Any) -> bool:
    is_mapping = isinstance(value, dict) and set(value) <= {"bytes", "path"} and value != {}
    return is_mapping or isinstance(value, bytes) or str(value)[:5].lower() == "data:"


def _find_columns(
    rows: Iterable[dict[str, Any] | str],
    table: str,
    names: Names,
    columns: Mapping[str, str | None],
) -> dict[str, str]:
    """Return which column of a table holds what."""
    there = list(dict.fromkeys(name for row in rows if not isinstance(row, str) for name in row))
    found = {}
    for what, usual in names.items():
        asked = columns.get(what)
        if asked is not None and asked not in there:
            raise ValueError(f"{table} has no column {asked!r}, its columns are {there}")
        if name := asked or next((name for name in usual if name in there), ""):
            found[what] = name
    if "text" not in found:
        kind = names["text"][0]
        raise ValueError(
            f"{table} has no column {kind!r}, its columns are {there}: name the one that holds "
            f"the {kind}s, columns.{kind}=NAME"
        )
    return found


def _row(
    kept: dict[str, Any] | str,
    named: Mapping[str, str],
    root: Path,
    number: int,
    needs_text: bool,
) -> Row:
    if isinstance(kept, str):
        return Row(str(number), number, problem=kept)
    held = {what: kept.get(name) for what, name in named.items()}
    images = _images(held.get("image"))
    called = ", ".join(image for image in images if isinstance(image, str))
    row = Row(
        as_text(held.get("id")) or str(number),
        number,
        as_text(held.get("text")),
        as_text(held.get("answer")),
        as_text(kept.get("image_id")) or called,
        {k: v for k, v in kept.items() if k not in named.values() and is_json(v)},
    )
    if needs_text and not row.text.strip():
        return replace(row, problem=f"the row has no {named['text']}")
    try:
        sources = [one if isinstance(one, Held) else _file(one, root) for one in images]
    except ValueError as error:
        return replace(row, problem=str(error))
    return replace(row, sources=tuple(sources))


def as_text(value: Any) -> str:
    """Write a value of a table as text: none as nothing, and a whole number without a point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _images(value: Any) -> list[str | Held]:
    """Return the images of a cell: none, one, or several, as a list or as JSON text of one."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    several = value if isinstance(value, list) else [value]
    images = [one if isinstance(one, Held) else as_text(one) for one in several]
    return [image for image in images if image]


def _file(text: str, root: Path) -> Path:
    """Find a file by its name, whose suffix a table may leave out; it need not be there yet.

    Raises:
        ValueError: if the text can be no path of this machine, or may mean several files.
    """
    if "://" in text:
        return Path(locate(text, root)[0])
    place = root / as_path(text)
    if place.is_file() or not place.name:
        return place
    named = [place.with_name(place.name + suffix) for suffix in SUFFIXES]
    found = [path for path in named if path.is_file()]
    if len(found) > 1:
        raise ValueError(f"{place} may be any of {', '.join(path.name for path in found)}")
    return found[0] if found else place


def _unique(rows: Iterable[Row]) -> Iterator[Row]:
    """Refuse a row whose id an earlier one has; it goes by its id and its number."""
    seen = set()
    for row in rows:
        if row.name in seen:
            problem = f"the id {row.name!r} is that of an earlier row too; each needs its own"
            row = replace(row, name=f"{row.name}#{row.number}", problem=problem)
        seen.add(row.name)
        yield row
