"""Annotation files to rows: indexable, picklable, and cheap to share with dataloader workers.

JSON is kept as text and parsed row by row, because a table with one type per column (what
`datasets` and Arrow make of it) cannot hold rows whose `image` is a string here and a list there,
and because one damaged line must be that row's error and not the file's.
"""

import codecs
import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

EXTRA_FIELDS = "fields beyond the header"
"""Key under which a table's row keeps what its header does not name."""


class Rows(Protocol):
    """What a reader needs of a set of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def column(self, name: str) -> list[Any]:
        """Return the values of one column, media untouched, None where a row has none."""

    def digest(self, index: int) -> str:
        """Return a short name of what is stored of a row, damaged or not."""


class JsonRows:
    """Rows kept as JSON text in one array, so that forked workers share it instead of copying it.

    Args:
        texts: one JSON object each, in UTF-8
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        texts = list(texts)
        self._text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self._ends = np.cumsum([len(text) for text in texts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self._stored(index)
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"the row is not JSON ({error}): {text[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"the row is not a JSON object: {text[:80]!r}")
        return row

    def column(self, name: str) -> list[Any]:
        return [self._value(index, name) for index in range(len(self))]

    def digest(self, index: int) -> str:
        return _digest(self._stored(index))

    def _stored(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].tobytes()

    def _value(self, index: int, name: str) -> Any:
        try:
            return self[index].get(name)
        except ValueError:
            return None


class ArrowRows:
    """Rows of a `datasets.Dataset`, media undecoded as `{"bytes", "path"}`, without padding.

    Arrow gives every dict of a column the same keys and fills what a dict lacked with null; those
    keys are dropped again.

    Args:
        dataset: a map-style dataset; its indices and row order are kept
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._features = datasets.Features(_without_media(dict(dataset.features)))
        self._table = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return _without_nulls(self._features.decode_example(self._stored(index)))

    def column(self, name: str) -> list[Any]:
        if name not in self._features:
            return [None] * len(self)
        return self._table.with_format(None).select_columns([name])[:][name]

    def digest(self, index: int) -> str:
        return _digest(repr(self._stored(index)).encode())

    def _stored(self, index: int) -> dict[str, Any]:
        return self._table[int(index)].to_pylist()[0]


def open_rows(source: str, *, split: str | None = None, **load_dataset_kwargs: Any) -> Rows:
    """Open rows by where they lie: the kind of storage, never the format of a row, is looked at.

    Args:
        source: a `.json` (array) or `.jsonl` file, a `.csv` or `.tsv` file with a header, a
            `.parquet` file, a folder written by `datasets`' `save_to_disk`, or anything
            `datasets.load_dataset` takes (a hub id, a builder name with `data_files`)
        split: split of a hub set or of a saved `DatasetDict`, by default "train"; files and a saved
            `Dataset` hold one split only
        **load_dataset_kwargs: passed on to `datasets.load_dataset`

    Raises:
        ValueError: if `source` looks like a file that does not exist, is a file of another kind,
            or is damaged as a whole, or an argument means nothing for it.
    """
    path = Path(source)
    options = load_dataset_kwargs | ({} if split is None else {"split": split})
    if (suffix := path.suffix.lower()) in _FILES:
        if not path.is_file():
            raise ValueError(f"{source}: no such file to read rows from")
        _refuse(source, options, "a file")
        return _FILES[suffix](path)
    if not path.exists() and _is_no_hub_id(source):
        raise ValueError(f"{source}: no such file or folder to read rows from")
    if path.is_file():
        raise ValueError(
            f"rows are read from files that end in {', '.join(_FILES)}, got {source}; convert it, "
            "or rename it if it is one of these"
        )
    if (path / "dataset_dict.json").is_file():
        _refuse(source, load_dataset_kwargs, "saved splits")
        splits = datasets.load_from_disk(source)
        if (name := split or "train") not in splits:
            raise ValueError(f"{source}: no split {name!r}, it holds {sorted(splits)}")
        return ArrowRows(splits[name])
    if (path / "state.json").is_file():
        _refuse(source, options, "a saved set without splits")
        return ArrowRows(datasets.load_from_disk(source))
    return ArrowRows(datasets.load_dataset(source, **{"split": "train", **options}))


def _is_no_hub_id(source: str) -> bool:
    return source[:1] in (".", "~", "/") or source.count("/") > 1 or source.endswith("/")


def _refuse(source: str, options: dict[str, Any], kind: str) -> None:
    if options:
        raise ValueError(f"{source}: {sorted(options)} mean nothing for {kind}; leave them out")


def json_texts(rows: Iterable[Any]) -> Iterator[bytes]:
    """Yield the JSON text of rows made in Python, and of each row in a list of rows."""
    for row in rows:
        for one in row if isinstance(row, list) else [row]:
            yield json.dumps(one, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _read_json(path: Path) -> JsonRows:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}); .jsonl for one row a line") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds one {type(rows).__name__}, not an array of rows")
    return JsonRows(json_texts(rows))


def _read_jsonl(path: Path) -> JsonRows:
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return JsonRows(text for line in lines if line.strip() for text in _rows_of_line(line))


def _rows_of_line(line: bytes) -> Iterable[bytes]:
    try:
        return json_texts(json.loads(line)) if line.lstrip()[:1] == b"[" else [line]
    except ValueError:
        return [line]


def _read_table(path: Path) -> JsonRows:
    with path.open(encoding="utf-8-sig", newline="") as file:
        dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
        reader = csv.DictReader(file, dialect=dialect, restkey=EXTRA_FIELDS, strict=True)
        try:
            return JsonRows(json_texts(reader))
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> ArrowRows:
    return ArrowRows(datasets.load_dataset("parquet", data_files=str(path), split="train"))


_FILES: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def _digest(stored: bytes) -> str:
    return hashlib.sha256(stored).hexdigest()[:16]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def _without_media(feature: Any) -> Any:
    """Return the same features with every Image, Video and Audio kept as bytes and path."""
    if isinstance(feature, dict):
        return {name: _without_media(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [_without_media(part) for part in feature]
    if isinstance(feature, datasets.Image | datasets.Video | datasets.Audio):
        return dataclasses.replace(feature, decode=False)
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_without_media(feature.feature))
    return feature
