"""Rows by where they lie: files, folders that were saved, archives, the hub."""

import codecs
import glob
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from torchtune_qwen25vl.media._compressed import (
    SUFFIXES_OF_COMPRESSION,
    content_or_file,
    read_content,
    suffix_within,
)
from torchtune_qwen25vl.media._lines import find_lines
from torchtune_qwen25vl.media._rows import ArrowRows, JsonRows, Rows, json_texts
from torchtune_qwen25vl.media._splits import ONLY, rows_of_split
from torchtune_qwen25vl.media._streams import BUFFER, open_stream
from torchtune_qwen25vl.media._tables import read_table
from torchtune_qwen25vl.media._tars import open_tars, tars_in

HELD = 1 << 28  # bytes of lines and records that are held; a larger file is read where it lies


def open_rows(source: str, *, split: str | None = None, **load_dataset_kwargs: Any) -> Rows:
    """Open rows by where they lie: the kind of storage, never the format of a row, is looked at.

    Tars, and JSON lines and tables of more than 256 MiB, are read where they lie, row by row; if
    they are compressed, they are first unpacked into a folder of the cache, once. The rows of other
    files are held in memory, those of `datasets` and of Parquet are on disk and mapped into it.

    Args:
        source: a `.json` (array) or `.jsonl` file, a `.csv` or `.tsv` file with a header, each also
            with `.gz` or `.zst` behind it; a `.parquet` file; a `.tar` file or a folder of them, as
            WebDataset has them; a folder written by `datasets`' `save_to_disk`, or anything
            `datasets.load_dataset` takes (a hub id, a builder name with `data_files`)
        split: split, or parts of it, such as `train[:95%]`; by default "train", which is the only
            split of files and of a saved `Dataset`
        **load_dataset_kwargs: passed on to `datasets.load_dataset`. With `streaming=True` its rows
            are read once a pass and kept nowhere, see `StreamRows`; `shuffle_buffer_size` (1000) is
            then the number of rows that are held, among which they are shuffled

    Raises:
        ValueError: if `source` looks like a file that does not exist, is a file of another kind,
            or is damaged as a whole, or an argument means nothing for it.
    """
    split = ONLY if split is None else split
    if (load := _loader(source, load_dataset_kwargs)) is not None:
        return rows_of_split(source, split, load)
    if "data_files" in load_dataset_kwargs:
        load_dataset_kwargs["data_files"] = _named(source, load_dataset_kwargs["data_files"])
    try:
        return _open_dataset(source, split, **load_dataset_kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):  # of a builder
            raise
        raise ValueError(f"{source}: {error}; mend that name, or leave it out") from error


def _open_dataset(source: str, split: str, *, streaming: bool = False, **options: Any) -> Rows:
    if streaming:
        return open_stream(source, split, **options)
    _refuse(source, options.keys() & {BUFFER}, "rows that are not streamed")
    load = partial(datasets.load_dataset, source, **options)
    return rows_of_split(source, split, lambda name: ArrowRows(load(split=name)))


def _loader(source: str, options: dict[str, Any]) -> Callable[[str], Rows] | None:
    """Return what opens a split of a source by its name; None for sources of `load_dataset`."""
    path = Path(source)
    if (kind := suffix_within(path)) in _FILES and _may_be_compressed(path, kind):
        if not path.is_file():
            raise ValueError(f"{source}: no such file to read rows from")
        return _whole(source, options, "a file", partial(_FILES[kind], path))
    if not path.exists() and _is_no_hub_id(source):
        raise ValueError(f"{source}: no such file or folder to read rows from")
    if path.is_file():
        raise ValueError(
            f"rows are read from files that end in {', '.join(_FILES)}, got {source}; convert it, "
            "or rename it if it is one of these"
        )
    if (path / "dataset_dict.json").is_file():
        _refuse(source, options, "saved splits")
        return partial(_saved_split, source)
    if (path / "state.json").is_file():
        load = partial(datasets.load_from_disk, source)
        return _whole(source, options, "a saved set without splits", lambda: ArrowRows(load()))
    if tars := tars_in(path):
        return _whole(source, options, "a folder of tars", partial(open_tars, tars))
    return None


def _whole(
    source: str, options: dict[str, Any], kind: str, load: Callable[[], Rows]
) -> Callable[[str], Rows]:
    """Return what opens rows that are one split."""
    _refuse(source, options, kind)

    def open_split(name: str) -> Rows:
        if name != ONLY:
            raise ValueError(f"{source}: {kind} is one split, called {ONLY}, got {name!r}")
        return load()

    return open_split


def _saved_split(source: str, name: str) -> Rows:
    splits = datasets.load_from_disk(source)
    if name not in splits:
        raise ValueError(f"{source}: no split {name!r}, it holds {sorted(splits)}")
    return ArrowRows(splits[name])


def _may_be_compressed(path: Path, kind: str) -> bool:
    return path.suffix.lower() not in SUFFIXES_OF_COMPRESSION or kind in _COMPRESSED


def _is_no_hub_id(source: str) -> bool:
    return source[:1] in (".", "~", "/") or source.count("/") > 1 or source.endswith("/")


def _refuse(source: str, options: Collection[str], kind: str) -> None:
    if options:
        raise ValueError(f"{source}: {sorted(options)} mean nothing for {kind}; leave them out")


def _read_json(path: Path) -> JsonRows:
    try:
        rows = json.loads(read_content(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a JSON file ({error}); .jsonl for one row a line") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: holds one {type(rows).__name__}, not an array of rows")
    return JsonRows(json_texts(rows))


def _read_jsonl(path: Path) -> Rows:
    content = content_or_file(path, HELD)
    if isinstance(content, Path):
        if (found := find_lines(content)) is not None:
            return found
        content = content.read_bytes()
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    return JsonRows(text for line in lines if line.strip() for text in _rows_of_line(line))


def _named(source: str, data_files: Any) -> Any:
    """Name files that there are so that `datasets` does not take brackets in them for patterns.

    Raises:
        ValueError: if the files of a builder are to lie here, and there is none.
    """
    if isinstance(data_files, Mapping):
        return {split: _named(source, files) for split, files in data_files.items()}
    if not isinstance(data_files, str):
        return [_named(source, file) for file in data_files]
    path = Path(data_files)
    if path.is_file():
        return glob.escape(str(path.absolute()))
    is_here = "/" not in source and "://" not in data_files  # neither of the hub nor of a network
    if is_here and not glob.glob(data_files, recursive=True):
        raise ValueError(f"{source}: data_files {data_files!r} finds no file; mend the path")
    return data_files


def _rows_of_line(line: bytes) -> Iterable[bytes]:
    try:
        return json_texts(json.loads(line)) if line.lstrip()[:1] == b"[" else [line]
    except ValueError:
        return [line]


def _read_table(path: Path) -> Rows:
    return read_table(path, HELD)


def _read_parquet(path: Path) -> ArrowRows:
    files = _named("parquet", str(path))
    return ArrowRows(datasets.load_dataset("parquet", data_files=files, split="train"))


def _read_tar(path: Path) -> Rows:
    return open_tars([path])


_COMPRESSED: dict[str, Callable[[Path], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
}
_FILES = {**_COMPRESSED, ".parquet": _read_parquet, ".tar": _read_tar}
