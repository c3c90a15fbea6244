"""What a job works on: folders, patterns, lists, tables and data sets become a list of items.

Nothing is decoded here. What cannot be listed (a damaged row, a folder that cannot be read) is an
item too, with a `problem`, so that it ends in a named state like every other.
"""

import codecs
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torchtune_qwen25vl.jobs._paths import as_path, folder_of
from torchtune_qwen25vl.jobs._row_images import RowImage
from torchtune_qwen25vl.media import SUFFIXES, Rows, Sieve, images_in, open_rows

logger = logging.getLogger(__name__)

LISTS = (".txt", ".lst")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SAVED_DATASET = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Item:
    """One image, and what is known of it beforehand.

    Attributes:
        name: what it is called in the journal and in tables: its path, or TABLE#ROW
        path: its file; None for an image inside a row
        root: folder that a mirror of the results starts from
        held: the image inside a row
        texts: of its row, by what they are to the job; none for a file of a folder
        row: its row in a table
        problem: why it cannot be worked on, found while listing
    """

    name: str
    path: Path | None = None
    root: Path = Path()
    held: RowImage | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    row: RowImage | None = None
    problem: str = ""

    def read(self) -> Any:
        """Return a source of `torchtune_qwen25vl.media.load_image`.

        Raises:
            ValueError: if its row has no image, or is damaged.
        """
        return self.path if self.held is None else self.held.read()

    @property
    def columns(self) -> dict[str, Any]:
        """The other columns of its row, those that JSON can hold; none where it is damaged."""
        return {} if self.row is None else self.row.others()


def find_items(
    inputs: Sequence[str],
    *,
    image_column: str = "image",
    text_columns: Mapping[str, str] | None = None,
    recursive: bool = True,
    exclude: Sequence[str] = (),
    text_suffix: str = ".txt",
) -> list[Item]:
    """List the images of all inputs: inputs in their order, files of a folder by name.

    Files that two inputs share are listed once. Of folders and patterns, hidden files and folders,
    masks and files of other kinds are left out, which the log says.

    Args:
        inputs: each a folder, an image, a pattern (`photos/**/*.jpg`), a list of paths
            (.txt, .lst), a table (.csv, .tsv, .json, .jsonl, .parquet), or a folder that
            `datasets` saved. Paths in a list or table are relative to its folder.
        image_column: column of a table that holds or names the image
        text_columns: column of each text that the job reads of a table, by what it is to the job
        recursive: look into the folders of a folder
        exclude: patterns of names, or of paths from an input on, that are left out of folders
        text_suffix: suffix of texts beside images, which are not counted as left out

    Raises:
        ValueError: if an input is none of these, or there are no images at all.
    """
    columns = _Columns(image_column, text_columns or {})
    items: dict[str, Item] = {}
    sieve = Sieve(exclude, text_suffix)
    for one in inputs:
        for item in _listed(one, columns, recursive, sieve):
            items.setdefault(item.name, item)
    if sieve.left_out:
        logger.info("left out of folders: %s", sieve)
    if not items:
        raise ValueError(
            f"there are no images in {', '.join(inputs) or 'no inputs'}; images end in "
            f"{' '.join(SUFFIXES)}"
        )
    return list(items.values())


class _Columns(NamedTuple):
    image: str
    texts: Mapping[str, str]


def _listed(one: str, columns: _Columns, recursive: bool, sieve: Sieve) -> Iterable[Item]:
    path = as_path(one)
    if path.is_dir():
        if any((path / name).is_file() for name in SAVED_DATASET):
            return _of_rows(path, columns)
        return _of_folder(path, recursive, sieve)
    if path.is_file():
        if path.suffix.lower() in LISTS:
            return [] if _is_text_file(path) else _of_list(path)
        return _of_rows(path, columns) if path.suffix.lower() in TABLES else [_file(path)]
    if glob.has_magic(one):
        return _of_pattern(path, sieve)
    raise _absent(one)


def refuse_absent(inputs: Sequence[str]) -> None:
    """Refuse inputs that are not there, before anything that takes time.

    Raises:
        ValueError: naming the first one that is neither there nor a pattern.
    """
    for one in inputs:
        if not glob.has_magic(one) and not as_path(one).exists():
            raise _absent(one)


def _absent(one: str) -> ValueError:
    return ValueError(f"an input is a folder, a file or a pattern that exists; {one} does not")


def _file(path: Path, root: Path | None = None) -> Item:
    path = Path(os.path.abspath(path))
    root = path.parent if root is None else Path(os.path.abspath(root))
    return Item(str(path), path, root)


def _named(source: str, table: Path, index: int) -> Item:
    """Make the item of a path in a list or table; of a text that is none, a problem."""
    try:
        item = _file(table.parent / as_path(source), table.parent)
    except ValueError as error:
        return _damaged(table, index, str(error))
    return item if item.path and item.path.name else _damaged(table, index, f"{source} is no file")


def _damaged(table: Path, index: int, problem: str) -> Item:
    return Item(f"{os.path.abspath(table)}#{index}", problem=problem)


def _is_text_file(path: Path) -> bool:
    """Whether this is the text of an image beside it, no list: a.txt or a.jpg.txt of a.jpg."""
    suffixes = [*SUFFIXES, *map(str.upper, SUFFIXES)]
    images = [path.with_suffix(suffix) for suffix in suffixes]
    full = path.with_suffix("")
    return any(image.is_file() for image in images) or (full.suffix in suffixes and full.is_file())


def _of_folder(folder: Path, recursive: bool, sieve: Sieve) -> Iterator[Item]:
    problems: list[Item] = []

    def report(error: OSError) -> None:
        name = os.path.abspath(error.filename)
        problems.append(Item(name, problem=f"the folder cannot be read: {error.strerror}"))

    for path in images_in(folder, sieve, recursive=recursive, report=report):
        yield _file(path, folder)
    yield from problems


def _of_pattern(pattern: Path, sieve: Sieve) -> Iterator[Item]:
    """List a pattern; its mirror starts from its last folder without a wildcard."""
    root = folder_of(pattern)
    wild = os.path.join(glob.escape(str(root)), pattern.relative_to(root))
    for path in map(Path, sorted(glob.glob(wild, recursive=True))):
        if not path.is_dir() and sieve.takes_file(path.relative_to(root), root):
            yield _file(path, root)


def _of_list(path: Path) -> Iterator[Item]:
    for index, line in enumerate(filter(None, map(str.strip, _read_list(path).split("\n")))):
        yield _named(line, path, index)


def _read_list(path: Path) -> str:
    """Read a list in UTF-8 or UTF-16, or else in cp1252 if that names files that are there.

    A name may be any bytes, so a list that is no UTF-8 may well be right as it is.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return content.decode("utf-16")
        except ValueError as error:
            raise ValueError(f"{path} begins as UTF-16 and is not: {error}") from error
    text = content.decode("utf-8-sig", "surrogateescape")
    lines = zip(text.split("\n"), content.decode("cp1252", "replace").split("\n"), strict=True)
    return "\n".join(
        other if not line.isprintable() and _is_there(other, path) else line
        for line, other in lines
    )


def _is_there(line: str, listing: Path) -> bool:
    return os.path.exists(os.path.join(listing.parent, line.strip()))


def _of_rows(path: Path, columns: _Columns) -> Iterator[Item]:
    try:
        rows = open_rows(str(path))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    texts = {kind: _texts(rows, name) for kind, name in columns.texts.items()}
    make = _of_row if _names_files(rows, columns.image, path) else _held
    for index in range(len(rows)):
        item = make(path, rows, index, columns.image)
        row = _row_image(path, rows, index, columns.image)
        yield replace(item, texts={kind: text(index) for kind, text in texts.items()}, row=row)


def _row_image(table: Path, rows: Rows, index: int, column: str) -> RowImage:
    folder = table if table.is_dir() else table.parent
    return RowImage(rows, index, column, Path(os.path.abspath(folder)))


def _names_files(rows: Rows, column: str, table: Path) -> bool:
    """Whether the images lie in files, by the first row that has one; no other is read.

    Raises:
        ValueError: if no row has an image, and one that is not damaged has other columns.
    """
    others: list[str] = []
    for index in range(len(rows)):
        try:
            row = rows[index]
        except ValueError:
            continue
        if row.get(column) is not None:
            return not isinstance(row[column], dict | bytes)
        others = others or sorted(row)
    if others and column not in others:
        raise ValueError(
            f"{table} has no column {column!r}, its columns are {others}: set columns.image, and "
            "separate the columns of a .csv by commas"
        )
    return True


def _texts(rows: Rows, column: str) -> Callable[[int], str]:
    values = rows.column(column)

    def text(index: int) -> str:
        value = values[index]
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")

    return text


def _held(path: Path, rows: Rows, index: int, column: str) -> Item:
    name = f"{os.path.abspath(path)}#{index}"
    return Item(name, held=_row_image(path, rows, index, column))


def _of_row(path: Path, rows: Rows, index: int, column: str) -> Item:
    try:
        source = _row_image(path, rows, index, column).stored()
    except ValueError as error:
        return _damaged(path, index, str(error))
    if isinstance(source, dict) or (
        isinstance(source, str) and source.startswith(("data:", "file:"))
    ):
        return _held(path, rows, index, column)
    if not isinstance(source, str):
        return _damaged(path, index, f"an image is named by its path, got {source!r}")
    return _named(source, path, index)
