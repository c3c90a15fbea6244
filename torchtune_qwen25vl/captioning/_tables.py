"""Tables of all captions, in UTF-8 without a byte order mark, each written as a whole."""

import csv
import io
import json
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.captioning._prompts import printable
from torchtune_qwen25vl.captioning._records import Record
from torchtune_qwen25vl.jobs import Item
from torchtune_qwen25vl.media import open_rows

logger = logging.getLogger(__name__)
COLUMNS = ("image", "state", "caption", "reason", "tokens", "max_pixels", "steps")


def write_tables(
    folder: Path,
    formats: Sequence[str],
    items: Sequence[Item],
    records: Sequence[Record],
    *,
    relative: bool,
) -> None:
    """Write the tables of a run, those that are in `formats`.

    Args:
        folder: output folder, of `captions.jsonl` and `captions.csv`
        formats: of jsonl, csv
        items: images; the other columns of their input tables are kept
        records: how they ended, in the same order
        relative: whether images are named by their path from the folder on
    """
    _set_edits_aside(folder)
    rows = [item.columns | as_row(one) for item, one in zip(items, records, strict=True)]
    if relative:
        for item, row in zip(items, rows, strict=True):
            if item.path is not None:
                path = Path(os.path.relpath(item.path, folder.absolute()))
                row["image"] = printable(path.as_posix())
    for suffix, make in (("jsonl", _jsonl), ("csv", _csv)):
        if suffix in formats:
            write_file(folder / f"captions.{suffix}", make(rows).encode())


def write_metadata(items: Sequence[Item], records: Sequence[Record], states: Sequence[str]) -> None:
    """Write `metadata.jsonl` into each input folder, as an image folder of `datasets` has it.

    Args:
        items: images; those inside tables are left out
        records: how they ended, in the same order
        states: of new captions that are written; those from before always are

    Raises:
        ValueError: if somebody else's file of that name lies there.
    """
    rows: dict[Path, list[dict[str, Any]]] = {}
    for item, record in zip(items, records, strict=True):
        if item.path is not None and record.state in ("skipped", *states):
            name = Path(os.path.relpath(item.path, item.root)).as_posix()
            row = {"file_name": printable(name), "text": printable(record.caption)}
            rows.setdefault(item.root, []).append(row)
    for root, found in rows.items():
        path = root / "metadata.jsonl"
        if path.exists() and set(_first_row(path)) != {"file_name", "text"}:
            raise ValueError(f"{path} is there and not of captions: move it away")
        write_file(path, _jsonl(found).encode())


def _first_row(path: Path) -> dict[str, Any]:
    try:
        return open_rows(str(path))[0]
    except (ValueError, IndexError):
        return {}


def _set_edits_aside(folder: Path) -> None:
    """Rename what the review page saved under the name of our table."""
    path = folder / "captions.jsonl"
    if path.exists() and '"edited":' in path.read_text("utf-8").partition("\n")[0]:
        aside = folder / f"edits-{1 + len(list(folder.glob('edits-*.jsonl')))}.jsonl"
        path.rename(aside)
        logger.warning("%s holds edits: it is now %s; --apply takes them", path, aside)


def read_table(folder: Path, without: Collection[str]) -> dict[str, str]:
    """Read the captions in the tables of an earlier run, by name.

    Args:
        folder: output folder of that run
        without: states of images that are left out

    Raises:
        ValueError: if a table is not one of ours.
    """
    path = folder / "captions.jsonl"
    try:
        if path.exists():
            lines = path.read_text("utf-8").split("\n")  # a caption may hold other line breaks
            rows: Iterable[dict[str, str]] = map(json.loads, filter(None, lines))
        elif (path := folder / "captions.csv").exists():
            rows = csv.DictReader(io.StringIO(path.read_text("utf-8"), newline=""))
        else:
            return {}
        return {
            os.path.abspath(folder / row["image"]): row["caption"]
            for row in rows
            if row["state"] not in without
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of captions ({error!r}): move it away, or choose another "
            "output_dir"
        ) from error


def read_edits(path: Path) -> dict[str, str]:
    """Read the captions that were edited, by the names that tables have for their images.

    Raises:
        ValueError: if the file cannot be read, or a row is no edit.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of edits")
    rows, edits = open_rows(str(path)), dict[str, str]()
    for index in range(len(rows)):
        try:
            row = rows[index]
            if row["edited"]:
                edits[str(row["image"])] = str(row["caption"]).strip()
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path}, row {index + 1}, is no edit ({error!r}): save them on the review page"
            ) from error
    return edits


def input_of(edits: Path) -> Path:
    """Find the folder whose `_captions` the edits are of: around them, or above their images.

    Raises:
        ValueError: if there is none, or the edits cannot be read.
    """
    above = [parent for image in read_edits(edits) for parent in Path(image).parents]
    for folder in [edits.absolute().parent.parent, *above]:
        if (folder / "_captions" / "captions.jsonl").is_file():
            return folder
    raise ValueError(f"name the inputs that {edits} is of: caption INPUT... --apply {edits}")


def as_row(record: Record) -> dict[str, str | int]:
    """Make a line of a table, its texts fit for UTF-8."""
    values = asdict(record)
    values["image"] = values["name"]
    row = {column: values[column] for column in COLUMNS}
    return {
        key: printable(value) if isinstance(value, str) else value for key, value in row.items()
    }


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO(newline="")
    others = dict.fromkeys(key for row in rows for key in row if key not in COLUMNS)
    writer = csv.DictWriter(text, (*COLUMNS, *others), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
