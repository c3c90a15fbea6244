"""Annotation files to rows: indexable, picklable, and cheap to share with dataloader workers.

JSON is kept as text and parsed row by row, because a table with one type per column (what
`datasets` and Arrow make of it) cannot hold rows whose `image` is a string here and a list there,
and because one damaged line must be that row's error and not the file's.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
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
        return parse_row(self._stored(index))

    def column(self, name: str) -> list[Any]:
        return [value_of(self._stored(index), name) for index in range(len(self))]

    def digest(self, index: int) -> str:
        return digest_of(self._stored(index))

    def _stored(self, index: int) -> bytes:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].tobytes()


class ArrowRows:
    """Rows of a `datasets.Dataset`, media undecoded as `{"bytes", "path"}`, without padding.

    Arrow gives every dict of a column the same keys and fills what a dict lacked with null; those
    keys are dropped again.

    Args:
        dataset: a map-style dataset; its indices and row order are kept
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._features = datasets.Features(without_media(dict(dataset.features)))
        self._table = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return decoded(self._stored(index), self._features)

    def column(self, name: str) -> list[Any]:
        if name not in self._features:
            return [None] * len(self)
        return self._table.with_format(None).select_columns([name])[:][name]

    def digest(self, index: int) -> str:
        return digest_of(repr(self._stored(index)).encode())

    def _stored(self, index: int) -> dict[str, Any]:
        return self._table[int(index)].to_pylist()[0]


def json_texts(rows: Iterable[Any]) -> Iterator[bytes]:
    """Yield the JSON text of rows made in Python, and of each row in a list of rows."""
    for row in rows:
        for one in row if isinstance(row, list) else [row]:
            yield json.dumps(one, ensure_ascii=False).encode("utf-8", "surrogatepass")


def parse_row(text: bytes) -> dict[str, Any]:
    """Read the JSON text of a row.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the row is not JSON ({error}): {text[:80]!r}") from error
    if not isinstance(row, dict):
        raise ValueError(f"the row is not a JSON object: {text[:80]!r}")
    return row


def value_of(text: bytes, name: str) -> Any:
    """Return what stands in a column of a row's text, None if it has none or is damaged."""
    try:
        return parse_row(text).get(name)
    except ValueError:
        return None


def digest_of(stored: bytes) -> str:
    """Return a short name of what is stored of a row."""
    return hashlib.sha256(stored).hexdigest()[:16]


def decoded(stored: dict[str, Any], features: datasets.Features | None) -> dict[str, Any]:
    """Return a row that Arrow stored as it was before, media undecoded.

    Args:
        stored: row as Arrow has it
        features: features without media; None where there are none to decode
    """
    return _without_nulls(stored if features is None else features.decode_example(stored))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def without_media(feature: Any) -> Any:
    """Return the same features with every Image, Video and Audio kept as bytes and path."""
    if isinstance(feature, dict):
        return {name: without_media(part) for name, part in feature.items()}
    if isinstance(feature, list):
        return [without_media(part) for part in feature]
    if isinstance(feature, datasets.Image | datasets.Video | datasets.Audio):
        return dataclasses.replace(feature, decode=False)
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=without_media(feature.feature))
    return feature
