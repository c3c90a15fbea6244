"""A run from its settings to its plan, and from its records to its files."""

import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

from torchtune_qwen25vl.hidden_states._questions import Questioner
from torchtune_qwen25vl.hidden_states._records import STATES, Record, digest
from torchtune_qwen25vl.hidden_states._rows import Row
from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.jobs import (
    Run,
    Workers,
    claimed,
    plan_batches,
    summary,
    take_up,
)

logger = logging.getLogger(__name__)
NAMED = 20  # failed rows, at most, at the end of a run


@dataclass
class Plan:
    """What all ranks have to know.

    Attributes:
        run: as it was begun, perhaps by an earlier start
        rows: by name, in input order
        settled: final records of rows, of this start or an earlier one
        unjournaled: those of them that are not yet in the journal
        batches: names of rows that go through the model together, of those still to be done
    """

    run: Run
    rows: dict[str, Row]
    settled: dict[str, Record] = field(default_factory=dict)
    unjournaled: list[Record] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)


def plan_run(
    settings: Settings, run: Run, questioner: Questioner, workers: Workers, stack: ExitStack
) -> Plan:
    """Find out what is to be done; headers of images are read, no image is decoded.

    Args:
        settings: of the recipe
        run: what states depend on now
        questioner: counts the tokens of prompts
        workers: read the headers
        stack: keeps the output folder claimed, unless it is a dry run

    Raises:
        ValueError: if another run is at work in the output folder, or what is in it cannot be read.
    """
    if not settings.dry_run:
        stack.enter_context(claimed(settings.folder))
    past = take_up(
        settings.folder,
        Record,
        run,
        complete=lambda record: record,
        restart=settings.restart,
        dry_run=settings.dry_run,
    )
    assert past.run is not None
    plan = Plan(past.run, {row.name: row for row in settings.rows})
    for name, row in plan.rows.items():
        record = past.records.get(name)
        if record is not None and _is_final(record, row, settings):
            plan.settled[name] = record
    counts = questioner.count_tokens(list(plan.rows.values()), workers)
    for name, count in counts.items():
        if count.problem and name not in plan.settled:
            record = failure(plan.rows[name], count.problem, settings)
            plan.settled[name] = record
            plan.unjournaled.append(record)
    batches = plan_batches(
        {name: count.value for name, count in counts.items() if not count.problem},
        batch_size=settings.batch_size,
        batch_tokens=min(settings.batch_tokens, past.run.batch_tokens),
        text_tokens=settings.max_new_tokens,
    )
    left = [[name for name in batch if name not in plan.settled] for batch in batches]
    plan.batches = [batch for batch in left if batch]
    return plan


def _is_final(record: Record, row: Row, settings: Settings) -> bool:
    if record.asked != question_digest(row, settings):
        return False
    return record.state == "done" or (record.stamp == row.stamp() and not settings.retry_failed)


def question_digest(row: Row, settings: Settings) -> str:
    try:
        return digest(settings.question(row), row)
    except ValueError:
        return ""


def failure(row: Row, reason: str, settings: Settings) -> Record:
    """Make the record of a row that failed."""
    asked = question_digest(row, settings)
    return Record(row.name, "failed", reason=reason, asked=asked, stamp=row.stamp())


def show_plan(settings: Settings, plan: Plan) -> int:
    """Say what would be done with every row; return the exit code."""
    for name in plan.rows:
        record = plan.settled.get(name)
        done = f"{record.state}, {record.reason}".rstrip(", ") if record else "to be asked"
        print(f"{name}: {done}")
    states: Counter[str] = Counter(record.state for record in plan.settled.values())
    pending = len(plan.rows) - len(plan.settled)
    print(f"{pending} to be asked in {len(plan.batches)} batches; {summary(states, STATES)}")
    return int(states["failed"] > 0)
