"""The run as a table, as JSON, and as one HTML page with the pictures."""

import base64
import html
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import PIL
import torch
import torchtune
import torchvision
from PIL import Image

from parity import reference
from parity.runner import Outcome, Sighting

COLUMNS = ("stage", "cases", "max error", "tolerance", "control's error", "verdict", "seconds")


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
    """One line of the table."""
    worst = outcome.worst
    return (
        outcome.stage.name,
        str(len(outcome.measurements)),
        _number(worst.error) if worst else "-",
        _number(worst.tolerance) if worst else "-",
        _number(outcome.control),
        verdict(outcome),
        f"{outcome.seconds:.1f}",
    )


def verdict(outcome: Outcome) -> str:
    """passed, or what is wrong, in a few words."""
    if outcome.problem:
        return "could not run"
    if outcome.passed:
        return "passed"
    blind = "" if outcome.control_caught else "control not seen"
    failed = [m.case for m in outcome.measurements if not m.error <= m.tolerance]
    return ", ".join(filter(None, [f"failed: {failed[0]}" if failed else "", blind]))


def table(rows: Sequence[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Rows under their columns, as Markdown."""
    widths = [max(len(line[k]) for line in [columns, *rows]) for k in range(len(columns))]
    lines = [columns, tuple("-" * width for width in widths), *rows]
    cells = (" | ".join(cell.ljust(w) for cell, w in zip(ln, widths, strict=True)) for ln in lines)
    return "\n".join(f"| {cell} |" for cell in cells)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def all_passed(outcomes: list[Outcome], sightings: list[Sighting]) -> bool:
    """Every stage passed and every fault was caught."""
    return all(o.passed for o in outcomes) and all(s.caught for s in sightings)


def as_json(outcomes: list[Outcome], sightings: list[Sighting]) -> dict:
    """Everything measured, full digits; infinities as strings."""
    return {
        "passed": all_passed(outcomes, sightings),
        "versions": versions(),
        "faults": [{**asdict(s), "error": _json_number(s.error)} for s in sightings],
        "stages": [
            {
                "name": outcome.stage.name,
                "what": outcome.stage.what,
                "tolerance": outcome.stage.tolerance,
                "fault": outcome.stage.fault,
                "passed": outcome.passed,
                "problem": outcome.problem,
                "error": _json_number(outcome.error),
                "control": _json_number(outcome.control),
                "control_caught": outcome.control_caught,
                "seconds": round(outcome.seconds, 2),
                "cases": [
                    {
                        "case": m.case,
                        "error": _json_number(m.error),
                        "tolerance": m.tolerance,
                    }
                    for m in outcome.measurements
                ],
            }
            for outcome in outcomes
        ],
    }


def write(outcomes: list[Outcome], sightings: list[Sighting], folder: Path) -> None:
    """Write parity-report.json and parity-report.html, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "parity-report.json", json.dumps(as_json(outcomes, sightings), indent=2) + "\n")
    _write(folder / "parity-report.html", page(outcomes, sightings))


def _write(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, delete=False, encoding="utf-8", suffix=".tmp"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


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
    passed = all_passed(outcomes, sightings)
    name, style = ("passed", "passed") if passed else ("failed", "failed")
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    rows = "".join(_html_row(outcome) for outcome in outcomes)
    sections = "".join(_section(outcome) for outcome in outcomes)
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Qwen2.5-VL parity</title>"
        f"<style>{STYLE}</style><h1>Parity with transformers: <span class='{style}'>{name}</span>"
        f"</h1><p><small>{html.escape(about)}</small></p><table><tr>{head}</tr>{rows}</table>"
        f"{sections}{_faults(sightings)}</html>\n"
    )


def _html_row(outcome: Outcome) -> str:
    cells = [html.escape(cell) for cell in row(outcome)]
    cells[0] = f"<a href='#{cells[0].replace(' ', '-')}'>{cells[0]}</a>"
    cells[5] = f"<span class='{'passed' if outcome.passed else 'failed'}'>{cells[5]}</span>"
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _section(outcome: Outcome) -> str:
    stage = outcome.stage
    cases = "".join(
        f"<tr><td>{html.escape(m.case)}</td><td>{_number(m.error)}</td>"
        f"<td>{_number(m.tolerance)}</td></tr>"
        for m in outcome.measurements
    )
    figures = "".join(
        f"<h4>{html.escape(m.case)}</h4>" + "".join(_figure(*picture) for picture in m.pictures)
        for m in outcome.measurements
        if m.pictures
    )
    problem = f"<p class='failed'>{html.escape(outcome.problem)}</p>" if outcome.problem else ""
    return (
        f"<h2 id='{stage.name.replace(' ', '-')}'>{html.escape(stage.name)}</h2>"
        f"<p>{html.escape(stage.what)}.<br><small>Tolerance {html.escape(stage.tolerance)}. "
        f"Control: {html.escape(stage.fault)}, error {_number(outcome.control)}.</small></p>"
        f"{problem}<details><summary>{len(outcome.measurements)} cases</summary><table>"
        f"<tr><th>case</th><th>max error</th><th>tolerance</th></tr>{cases}</table></details>"
        f"{figures}"
    )


def _faults(sightings: list[Sighting]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(s.fault)}</td><td>{html.escape(s.stage)}</td>"
        f"<td>{_number(s.error)}</td><td class='{'passed' if s.caught else 'failed'}'>"
        f"{'caught' if s.caught else 'missed'}</td></tr>"
        for s in sightings
    )
    head = "<tr><th>fault</th><th>stage</th><th>error</th><th>verdict</th></tr>"
    return f"<h2>Seeded faults</h2><table>{head}{rows}</table>"


def _figure(caption: str, picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
