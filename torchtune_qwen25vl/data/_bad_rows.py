"""Which rows a dataset leaves out: those that a report of the check command lists."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.media import Rows, StreamRows


def read_bad_rows(report: str, source: str, rows: Rows) -> tuple[int, ...]:
    """Return the numbers of the bad rows that a report lists for a source.

    Args:
        report: report.json of the check command
        source: name of the dataset in the report
        rows: rows of that source, as they are now

    Raises:
        ValueError: if there is no such report, it did not check this source, or the rows are not
            those it checked: their number, or what stands in a bad one, has changed.
    """
    again = "run `python -m torchtune_qwen25vl.data check` again"
    if not Path(report).is_file():
        raise ValueError(f"skip_bad_rows names no file: {report}; {again}")
    entries = json.loads(Path(report).read_text())["datasets"]
    if not (checked := [entry for entry in entries if entry["source"] == source]):
        about = sorted({entry["source"] for entry in entries})
        raise ValueError(f"{report} is about {about}, not about {source}; {again}")
    # two splits of one source, as of dataset and val_dataset, are told apart by what is in them
    entry = next((entry for entry in checked if _describes(entry, rows)), checked[0])
    if entry["rows"] != len(rows):
        raise ValueError(
            f"{source} has {len(rows)} rows but had {entry['rows']} when {report} was written; "
            f"{again}"
        )
    if isinstance(rows, StreamRows):
        if not _describes(entry, rows):
            raise ValueError(f"{source} is not the stream that {report} is about; {again}")
        return tuple(bad["row"] for bad in entry["bad"])
    for bad in entry["bad"]:
        if rows.digest(bad["row"]) != bad["digest"]:
            raise ValueError(
                f"{source}, row {bad['row']}: bad in {report}, but changed since; {again}"
            )
    return tuple(bad["row"] for bad in entry["bad"])


def _describes(entry: Mapping[str, Any], rows: Rows) -> bool:
    """Return whether an entry of a report is about these rows, as they are now."""
    if entry["rows"] != len(rows):
        return False
    if isinstance(rows, StreamRows):  # not read to its bad rows, but known by its first ones
        return entry.get("stream") == rows.identity()
    return all(rows.digest(bad["row"]) == bad["digest"] for bad in entry["bad"])
