"""Which rows a dataset leaves out: those that a report of the check command lists."""

import json
from pathlib import Path

from torchtune_qwen25vl.data._rows import Rows


def read_bad_rows(report: str, source: str, rows: Rows) -> tuple[int, ...]:
    """Numbers of the bad rows that a report lists for a source.

    Args:
        report: report.json of the check command.
        source: the dataset's, as the report names it.
        rows: of that source, as they are now.

    Raises:
        ValueError: if there is no such report, it did not check this source, or the rows are not
            those it checked: their number, or what stands in a bad one, has changed.
    """
    again = "run `python -m torchtune_qwen25vl.data check` again"
    if not Path(report).is_file():
        raise ValueError(f"skip_bad_rows names no file: {report}; {again}")
    checked = {entry["source"]: entry for entry in json.loads(Path(report).read_text())["datasets"]}
    if source not in checked:
        raise ValueError(f"{report} is about {sorted(checked)}, not about {source}; {again}")
    entry = checked[source]
    if entry["rows"] != len(rows):
        raise ValueError(
            f"{source} has {len(rows)} rows but had {entry['rows']} when {report} was written; "
            f"{again}"
        )
    for bad in entry["bad"]:
        if rows.digest(bad["row"]) != bad["digest"]:
            raise ValueError(
                f"{source}, row {bad['row']}: bad in {report}, but changed since; {again}"
            )
    return tuple(bad["row"] for bad in entry["bad"])
