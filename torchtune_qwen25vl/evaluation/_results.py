"""From the records of a run to its scores: rows, means, the files that hold them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.evaluation._metrics import Case, Score, averaged, score_rows
from torchtune_qwen25vl.evaluation._places import moved
from torchtune_qwen25vl.evaluation._records import Record
from torchtune_qwen25vl.evaluation._settings import Settings
from torchtune_qwen25vl.evaluation._truths import Truth
from torchtune_qwen25vl.jobs import Row

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"


@dataclass(frozen=True)
class Scored:
    """A row with its answer and what it is worth.

    Attributes:
        row: row of the table
        case: the answer beside what the table says; None where it failed
        record: how it ended
        scores: scores by metric; none where it failed
        problem: why it failed
    """

    row: Row
    case: Case | None
    record: Record
    scores: Mapping[str, float]
    problem: str = ""


@dataclass(frozen=True)
class Results:
    """What a run came to.

    Attributes:
        rows: rows in input order
        scores: mean of each metric, over the rows that did not fail
    """

    rows: Sequence[Scored]
    scores: Mapping[str, Score]

    @property
    def failed(self) -> list[Scored]:
        """Rows without a score."""
        return [row for row in self.rows if row.case is None]

    def __str__(self) -> str:
        """Say each mean with its standard error, and of how many rows it is."""
        width = max(map(len, self.scores))
        count, lost = len(self.rows), len(self.failed)
        lines = []
        for name, score in self.scores.items():
            error = "" if score.standard_error is None else f" +- {score.standard_error:.4f}"
            mean = "none" if score.mean is None else f"{score.mean:.4f}"
            lines.append(f"{name:{width}}  {mean}{error}  {score.n} of {count} rows")
        lines.append(f"{lost} rows failed and count in no mean" if lost else "no row failed")
        return "\n".join(lines)


def score_records(settings: Settings, records: Mapping[str, Record]) -> Results:
    """Score every row.

    Args:
        settings: settings of the recipe
        records: how rows ended, by name
    """
    found = [_case(row, records[row.name], settings.truths) for row in settings.rows]
    scores = score_rows(
        settings.scored,
        [case for case in found if isinstance(case, Case)],
        anls_threshold=settings.anls_threshold,
        iou_threshold=settings.iou_threshold,
    )
    columns = {name: iter(values) for name, values in scores.items()}
    rows = []
    for row, case in zip(settings.rows, found, strict=True):
        record = records[row.name]
        if isinstance(case, str):
            rows.append(Scored(row, None, record, {}, case))
        else:
            own = {name: next(values) for name, values in columns.items()}
            rows.append(Scored(row, case, record, own))
    return Results(rows, {name: averaged(values) for name, values in scores.items()})


def _case(row: Row, record: Record, truths: Mapping[str, Truth]) -> Case | str:
    """Put an answer beside what the table says of its row, or say why that cannot be."""
    if record.state == "failed":
        return record.reason
    truth = truths[row.name]
    try:
        boxes = moved(truth.boxes, record.sizes) if truth.boxes else ()
    except ValueError as error:
        return str(error)
    return Case(
        record.answer, truth.references, boxes, truth.choices, truth.right, record.log_probs
    )


def write_predictions(folder: Path, results: Results) -> None:
    """Write a line for each row, in input order: what was asked, said, wanted, and its scores."""
    lines = [json.dumps(_entry(row), ensure_ascii=False) for row in results.rows]
    text = "".join(f"{line}\n" for line in lines)
    write_file(folder / PREDICTIONS, text.encode("utf-8", "backslashreplace"))


def _entry(scored: Scored) -> dict[str, Any]:
    row, record, case = scored.row, scored.record, scored.case or Case()
    return {
        "id": row.name,
        "state": "failed" if scored.problem else "done",
        "reason": scored.problem,
        "image": row.image_id,
        "question": row.text,
        "answer": record.answer,
        "finish": record.finish,
        "tokens": record.tokens,
        "references": list(case.references or case.boxes),
        "choices": list(case.choices),
        "log_probs": list(record.log_probs),
        "scores": dict(scored.scores),
    }


def write_scores(folder: Path, results: Results, about: Mapping[str, Any]) -> None:
    """Write the means, of how many rows they are, and what they depend on.

    Args:
        folder: output folder of the run
        results: results of the run
        about: model and settings
    """
    finishes = [row.record.finish for row in results.rows]
    told = {
        **about,
        "scores": {name: asdict(score) for name, score in results.scores.items()},
        "rows": len(results.rows),
        "failed": len(results.failed),
        "cut": finishes.count("cut"),
        "looped": finishes.count("looped"),
    }
    write_file(folder / SCORES, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
