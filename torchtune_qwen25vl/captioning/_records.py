"""How an image ended: what the journal holds of it, and its text file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from torchtune_qwen25vl.captioning._texts import write_text
from torchtune_qwen25vl.jobs import FULL, Journal

State = Literal["done", "skipped", "failed", "cut", "looped"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Record:
    """How one image ended.

    Attributes:
        name: of the item
        state: done; skipped, as it had a caption; failed, for `reason`; cut, at the length
            limit; looped, repeating itself
        caption: the text as it is written out
        reason: of failed and skipped
        tokens: number of tokens of the answer
        max_pixels: limit the image was resized to
        steps: what had to be done to get there, such as halving a batch
        file: text file that the caption goes into, if any
        placed: whether that text file has been written
        stamp: size and time of the image file that failed; it is tried again when they change
        absent: whether it failed as the image, or the folder of its text file, was not there; it
            is tried again when that has come back
    """

    name: str
    state: State
    caption: str = ""
    reason: str = ""
    tokens: int = 0
    max_pixels: int = 0
    steps: str = ""
    file: str = ""
    placed: bool = False
    stamp: str = ""
    absent: bool = False


def failure(name: str, reason: str, image: Path | None) -> Record:
    """Make the record of an image that failed.

    Args:
        name: of the item
        reason: why it failed
        image: its file, if it is one
    """
    absent = image is not None and not os.path.exists(image)
    return Record(name, "failed", reason=reason, stamp=stamp_of(image), absent=absent)


def stamp_of(image: Path | None) -> str:
    """Describe the state of a file by size and time; empty where there is none."""
    try:
        stat = image.stat() if image else None
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}" if stat else ""


def place(record: Record) -> Record:
    """Write the text file of a record, if it has one that is not written yet.

    Returns:
        The record with its file in place, or failed where that cannot be done.

    Raises:
        OSError: if the disk is full; the next start writes the file.
    """
    if record.placed or record.state == "failed" or not record.file:
        return record
    try:
        write_text(Path(record.file), record.caption)
    except OSError as error:
        if error.errno in FULL:
            raise
        reason = f"its caption is not written: {error}"
        absent = not Path(record.file).parent.exists()
        return replace(record, state="failed", reason=reason, absent=absent)
    return replace(record, placed=True)


def write_down(journal: Journal[Record], records: Sequence[Record]) -> list[Record]:
    """Write records into the journal, then into text files; return them as they ended.

    The journal knows a caption before any text file holds it. A run that is killed in between
    finds the record not yet placed, and writes the file when it is started again.
    """
    journal.add(records)
    ended = [place(record) for record in records]
    journal.add([new for new, old in zip(ended, records, strict=True) if new != old])
    return ended
