"""The run as a table, as JSON, and as one HTML page with the pictures."""

import base64
import html
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import PIL
import torch
import torchtune
import torchvision
from PIL import Image

from parity import reference
from parity.deviations import Deviation
from parity.runner import Outcome, Sighting
from parity.stages import Measurement
from torchtune_qwen25vl._files import write_file

COLUMNS = ("stage", "cases", "max error", "tolerance", "control's error", "verdict", "seconds")
CASE_COLUMNS = ("case", "max error", "tolerance")
DEVIATION_COLUMNS = (
    "stage",
    "from",
    "before",
    "what it does",
    "equals the fault, or raises",
    "thread",
    "here",
)
FAULT_COLUMNS = ("fault", "stage", "error", "verdict", "by")
INFINITE = "inf: a shape differs, or a value is not finite"


def versions() -> dict[str, str]:
    """What was compared, and on what."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "torchtune": torchtune.__version__ or "development",
        "transformers": reference.VERSION,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def row(outcome: Outcome) -> tuple[str, ...]:
    """One line of the table, in the order of `COLUMNS`."""
    worst, control = outcome.worst, outcome.control
    return (
        outcome.stage.name,
        str(len(outcome.measurements)),
        _number(worst.error) if worst else "-",
        _number(worst.tolerance) if worst else "-",
        _number(control.error) if control and not control.is_theirs else "-",
        verdict(outcome),
        f"{outcome.seconds:.1f}",
    )


def case_row(measurement: Measurement) -> tuple[str, ...]:
    """One case, in the order of `CASE_COLUMNS`."""
    error = measurement.refusal or _number(measurement.error)
    return measurement.case, error, _number(measurement.tolerance)


def fault_row(sighting: Sighting) -> tuple[str, ...]:
    """One fault before one stage, in the order of `FAULT_COLUMNS`."""
    seen_by = sighting.case or sighting.problem
    return sighting.fault, sighting.stage, _number(sighting.error), sighting.verdict, seen_by


def deviation_row(deviation: Deviation) -> tuple[str, ...]:
    """One deviation of transformers, in the order of `DEVIATION_COLUMNS`."""
    d = deviation
    here = "yes" if d.holds(reference.VERSION) else ""
    refusal = "not there" if d.is_absence else d.refusal
    equals = d.fault or f"{refusal}: {', '.join(d.cases)}"
    return d.stage, d.first or "-", d.fixed or "-", d.what, equals, d.thread or "-", here


def verdict(outcome: Outcome) -> str:
    """Say `passed`, or what is wrong, in a few words."""
    if outcome.problem:
        return "could not run"
    if outcome.passed:
        absent = sum(d.is_absence for d in outcome.deviating.values())
        count = len(outcome.deviating) - absent
        words = ["passed"]
        words += [f"{count} as its deviation says"] if count else []
        words += [f"{absent} not there"] if absent else []
        return ", ".join(words)
    if outcome.deviating and not outcome.there:
        return "not there"
    words = [f"failed: {m.case}" + (m.refusal and f" by {m.refusal}") for m in outcome.failed[:1]]
    if outcome.control is not None and not outcome.control.passed:
        words.append(f"control {outcome.control.verdict}")
    return ", ".join(words) or "no cases"


def table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Rows under their columns, as Markdown."""
    widths = [max(len(line[k]) for line in [columns, *rows]) for k in range(len(columns))]
    lines = [columns, tuple("-" * width for width in widths), *rows]
    cells = (" | ".join(cell.ljust(w) for cell, w in zip(ln, widths, strict=True)) for ln in lines)
    return "\n".join(f"| {cell} |" for cell in cells)


def html_table(rows: Iterable[tuple[str, ...]], columns: tuple[str, ...]) -> str:
    """Rows under their columns, as HTML; verdicts are coloured."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, cells, columns))}</tr>" for cells in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str, column: str) -> str:
    good = "passed" if text.startswith(("passed", "caught", "theirs")) else "failed"
    style = f" class='{good}'" if column == "verdict" else ""
    shown = html.escape(text)
    if column == "stage":
        shown = f"<a href='#{_anchor(text)}'>{shown}</a>"
    return f"<td{style}>{shown}</td>"


def _anchor(stage: str) -> str:
    return stage.replace(" ", "-")


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def all_passed(outcomes: list[Outcome], sightings: list[Sighting]) -> bool:
    """Whether every stage passed and every fault was caught."""
    return all(o.passed for o in outcomes) and all(s.passed for s in sightings)


def as_json(outcomes: list[Outcome], sightings: list[Sighting]) -> dict:
    """Everything measured, in full digits; infinities are strings."""
    return {
        "passed": all_passed(outcomes, sightings),
        "versions": versions(),
        "faults": [_fault_as_json(sighting) for sighting in sightings],
        "stages": [_stage_as_json(outcome) for outcome in outcomes],
    }


def _fault_as_json(sighting: Sighting) -> dict:
    error = _json_number(sighting.error)
    return {**asdict(sighting), "error": error, "verdict": sighting.verdict}


def _stage_as_json(outcome: Outcome) -> dict:
    stage, control = outcome.stage, outcome.control
    return {
        "name": stage.name,
        "what": stage.what,
        "tolerance": stage.tolerance,
        "passed": outcome.passed,
        "verdict": verdict(outcome),
        "problem": outcome.problem,
        "deviations": {case: d.what for case, d in outcome.deviating.items()},
        "error": _json_number(outcome.error),
        "control": _fault_as_json(control) if control else None,
        "seconds": round(outcome.seconds, 2),
        "cases": [
            {
                "case": m.case,
                "error": _json_number(m.error),
                "tolerance": m.tolerance,
                "refusal": m.refusal,
            }
            for m in outcome.measurements
        ],
    }


def write(outcomes: list[Outcome], sightings: list[Sighting], folder: Path) -> None:
    """Write parity-report.json and parity-report.html, each whole or not at all."""
    text = json.dumps(as_json(outcomes, sightings), indent=2) + "\n"
    write_file(folder / "parity-report.json", text.encode())
    write_file(folder / "parity-report.html", page(outcomes, sightings).encode())


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
       color: #1d2430; background: #fbfbfa }
table { border-collapse: collapse; width: 100% } td, th { padding: .3rem .6rem; text-align: left;
       border-bottom: 1px solid #dcdcd6 } td:nth-child(n+2) { font-variant-numeric: tabular-nums }
.passed { color: #0a7d32; font-weight: 600 } .failed { color: #b3261e; font-weight: 600 }
figure { display: inline-block; margin: .4rem .8rem .4rem 0; vertical-align: top }
img { max-width: 20rem; max-height: 15rem; border: 1px solid #dcdcd6; image-rendering: auto }
figcaption { font-size: 13px; color: #5a6270 } h2 { margin-top: 2.2rem } summary { cursor: pointer }
small { color: #5a6270 }
"""


def page(outcomes: list[Outcome], sightings: list[Sighting]) -> str:
    """One self-contained page: the table, then every stage with its cases and pictures."""
    name = "passed" if all_passed(outcomes, sightings) else "failed"
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Qwen2.5-VL parity</title>"
        f"<style>{STYLE}</style><h1>Parity with transformers: <span class='{name}'>{name}</span>"
        f"</h1><p><small>{html.escape(about)}. {INFINITE}.</small></p>"
        f"{html_table(map(row, outcomes), COLUMNS)}{''.join(map(_section, outcomes))}"
        f"<h2>Seeded faults</h2>{html_table(map(fault_row, sightings), FAULT_COLUMNS)}</html>\n"
    )


def _section(outcome: Outcome) -> str:
    stage, control = outcome.stage, outcome.control
    seen = f", error {_number(control.error)}, {control.verdict}" if control else ""
    figures = "".join(
        f"<h4>{html.escape(m.case)}</h4>" + "".join(_figure(*picture) for picture in m.pictures)
        for m in outcome.measurements
        if m.pictures
    )
    problem = f"<p class='failed'>{html.escape(outcome.problem)}</p>" if outcome.problem else ""
    return (
        f"<h2 id='{_anchor(stage.name)}'>{html.escape(stage.name)}</h2>"
        f"<p>{html.escape(stage.what)}.<br><small>Tolerance {html.escape(stage.tolerance)}. "
        f"Control: {html.escape(stage.fault)}{seen}.</small></p>"
        f"{problem}<details><summary>{len(outcome.measurements)} cases</summary>"
        f"{html_table(map(case_row, outcome.measurements), CASE_COLUMNS)}</details>{figures}"
    )


def _figure(caption: str, picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
