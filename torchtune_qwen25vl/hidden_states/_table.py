"""What is known of each row beside its states: rows.jsonl, a line for each in input order."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.hidden_states._records import Record
from torchtune_qwen25vl.jobs import Row

FILE = "rows.jsonl"


def write_table(folder: Path, rows: Sequence[Row], records: Mapping[str, Record]) -> None:
    """Write the table of a run, whole or not at all.

    Args:
        folder: of the run
        rows: in input order
        records: how they ended, by name
    """
    lines = [json.dumps(_entry(row, records[row.name]), ensure_ascii=False) for row in rows]
    text = "".join(f"{line}\n" for line in lines)
    write_file(folder / FILE, text.encode("utf-8", "backslashreplace"))


def _entry(row: Row, record: Record) -> dict[str, Any]:
    return {
        "id": row.name,
        "state": record.state,
        "reason": record.reason,
        "image": row.image_id,
        "question": row.text,
        "truth": row.truth,
        "answer": record.answer,
        "finish": record.finish,
        "tokens": record.tokens,
        "columns": dict(row.columns),
        "places": dict(record.places),
    }


def read_table(folder: Path) -> list[dict[str, Any]]:
    """Read the table of a run.

    Raises:
        ValueError: if it is damaged.
    """
    path = folder / FILE
    try:
        return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): start the run again") from error
