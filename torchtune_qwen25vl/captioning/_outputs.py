"""Captions on disk: a text file for each image, and tables of all of them.

Every file is written under a hidden name and renamed, in UTF-8 without a byte order mark.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.captioning._prompts import printable
from torchtune_qwen25vl.jobs import Item, Record

Existing = Literal["skip", "overwrite", "append", "prepend"]
EXISTING = ("skip", "overwrite", "append", "prepend")
FORMATS = ("txt", "jsonl", "csv")
COLUMNS = ("image", "state", "caption", "reason", "tokens", "max_pixels", "steps")


@dataclass(frozen=True)
class TextFiles:
    """Where the text file of an image lies.

    Attributes:
        mirror: folder that repeats the folders of the images; None to write beside each image
        naming: "stem" for a.txt, "full" for a.jpg.txt
    """

    mirror: Path | None = None
    naming: Literal["stem", "full"] = "stem"

    def path(self, item: Item) -> Path:
        """Of one item.

        Raises:
            ValueError: if it is no file, and there is no mirror.
        """
        if item.path is None:
            if self.mirror is None:
                raise ValueError(
                    f"{item.name} lies inside a table, so no text file can lie beside it: set "
                    "mirror_dir, or write jsonl or csv"
                )
            table, _, row = item.name.rpartition("#")
            return self.mirror / Path(table).name / f"{row}.txt"
        path = item.path
        if self.mirror is not None:
            path = self.mirror / os.path.relpath(path, item.root).replace("../", "")
        stem = path.stem if self.naming == "stem" else path.name
        return path.with_name(f"{stem}.txt")


def combined(existing: str, caption: str, policy: Existing) -> str:
    """The text of a caption and one that was there before."""
    texts = {"append": (existing, caption), "prepend": (caption, existing)}
    return " ".join(filter(None, texts.get(policy, (caption,))))


def read_text(path: Path) -> str:
    """The caption in a text file; empty where there is none.

    Raises:
        ValueError: if it is not UTF-8.
        OSError: if it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise ValueError(f"the caption in {path} cannot be read: {error}") from error


def write_text(path: Path, caption: str) -> None:
    """Write a text file."""
    write_file(path, f"{caption}\n".encode())


def write_tables(folder: Path, formats: Sequence[str], records: Sequence[Record]) -> None:
    """Write `captions.jsonl` and `captions.csv`, those of them that are in `formats`."""
    for suffix, make in (("jsonl", _jsonl), ("csv", _csv)):
        if suffix in formats:
            write_file(folder / f"captions.{suffix}", make(map(as_row, records)).encode())


def read_table(folder: Path) -> dict[str, str]:
    """Captions by name in the tables of an earlier run, those that were not written left out.

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
        return {row["image"]: row["caption"] for row in rows if row["state"] != "failed"}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no table of captions ({error!r}): move it away, or choose another "
            "output_dir"
        ) from error


def as_row(record: Record) -> dict[str, str | int]:
    """A line of a table, its texts fit for UTF-8."""
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
