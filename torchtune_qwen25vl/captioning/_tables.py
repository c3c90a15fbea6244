"""Tables of all captions, in UTF-8 without a byte order mark, each written as a whole."""

import csv
import io
import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.captioning._prompts import printable
from torchtune_qwen25vl.captioning._records import Record
from torchtune_qwen25vl.media import open_rows

logger = logging.getLogger(__name__)
COLUMNS = ("image", "state", "caption", "reason", "tokens", "max_pixels", "steps")


def write_tables(folder: Path, formats: Sequence[str], records: Sequence[Record]) -> None:
    """Write `captions.jsonl` and `captions.csv`, those of them that are in `formats`."""
    _set_edits_aside(folder)
    for suffix, make in (("jsonl", _jsonl), ("csv", _csv)):
        if suffix in formats:
            write_file(folder / f"captions.{suffix}", make(map(as_row, records)).encode())


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
        return {row["image"]: row["caption"] for row in rows if row["state"] not in without}
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


def _jsonl(rows: Iterable[dict[str, str | int]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _csv(rows: Iterable[dict[str, str | int]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
