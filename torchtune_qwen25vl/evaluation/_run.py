"""A run from its records to its files, and what a rank writes down on the way."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torchtune_qwen25vl.device import LoadedModel
from torchtune_qwen25vl.evaluation._page import write_page
from torchtune_qwen25vl.evaluation._records import Record, Reply
from torchtune_qwen25vl.evaluation._results import (
    PREDICTIONS,
    score_records,
    write_predictions,
    write_scores,
)
from torchtune_qwen25vl.evaluation._settings import Settings
from torchtune_qwen25vl.jobs import (
    RowPlan,
    Workers,
    name_failed,
    read_journals,
    row_failure,
)

logger = logging.getLogger(__name__)


def records_of(
    replies: Sequence[Reply], problems: Mapping[str, str], settings: Settings, plan: RowPlan[Record]
) -> list[Record]:
    """Make the records of a batch.

    Args:
        replies: replies of the model
        problems: why the other rows were not asked, by name
        settings: settings of the recipe
        plan: plan of the run
    """
    failed = dict(problems) | {r.question.name: r.reason for r in replies if r.reason}
    done = [record_of(reply, settings) for reply in replies if not reply.reason]
    return done + [row_failure(Record, plan.rows[n], why, settings) for n, why in failed.items()]


def record_of(reply: Reply, settings: Settings) -> Record:
    """Make the record of a row that was answered."""
    question = reply.question
    return Record(
        question.name,
        "done",
        asked=settings.asked(question.row),
        answer=reply.answer,
        finish=reply.finish,
        tokens=reply.tokens,
        log_probs=reply.log_probs,
        sizes=question.sizes,
    )


def write_outputs(
    settings: Settings, plan: RowPlan[Record], model: LoadedModel, workers: Workers
) -> int:
    """Score all rows, and write predictions, scores and page; return the exit code.

    Args:
        settings: settings of the recipe
        plan: plan of the run, whose rows all ranks have gone through
        model: model that was asked
        workers: read images for the page
    """
    folder = settings.folder
    records = read_journals(folder, Record).records | plan.settled
    results = score_records(settings, records)
    about = _about(settings, plan, model)
    write_predictions(folder, results)
    write_scores(folder, results, about)
    said = f"{results}\n{json.dumps(about, ensure_ascii=False)}"
    if settings.review:
        page = write_page(folder, results, said, workers, settings.review)
        logger.info("look through the answers in %s", page)
    lines = [f"{row.row.name}: {row.problem}" for row in results.failed]
    name_failed(lines, f"{folder / PREDICTIONS} names")
    print(said)
    return int(bool(lines))


def _about(settings: Settings, plan: RowPlan[Record], model: LoadedModel) -> dict[str, Any]:
    """Return what scores depend on: the model, its numbers, and the settings."""
    limits = {
        "min_pixels": settings.min_pixels or model.transform.min_pixels,
        "max_pixels": plan.run.max_pixels,
    }
    run = {"model": settings.model, "weights": plan.run.weights, "format": plan.run.format}
    return {**run, "settings": settings.told() | limits}
