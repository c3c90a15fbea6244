"""What is to be done with the rows of tables, from what is on disk already."""

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torchtune_qwen25vl.jobs._batches import plan_batches
from torchtune_qwen25vl.jobs._begin import begin
from torchtune_qwen25vl.jobs._journal import Run
from torchtune_qwen25vl.jobs._progress import summary
from torchtune_qwen25vl.jobs._row_questions import RowQuestioner
from torchtune_qwen25vl.jobs._table_rows import Row
from torchtune_qwen25vl.jobs._table_settings import TableSettings
from torchtune_qwen25vl.jobs._workers import Workers

ROW_STATES = ("done", "failed")


@dataclass(frozen=True)
class RowRecord:
    """How one row ended; a job's own record has more.

    Attributes:
        name: name of the row
        state: done, or failed for `reason`
        reason: why it failed
        asked: digest of the question and of the names of its images; of another one the record
            counts for nothing
        stamp: size and time of its files; a row that failed is tried again when they change
    """

    name: str
    state: str
    reason: str = ""
    asked: str = ""
    stamp: str = ""


R = TypeVar("R", bound=RowRecord)


@dataclass
class RowPlan(Generic[R]):
    """What all ranks have to know.

    Attributes:
        run: as it was begun, perhaps by an earlier start
        rows: rows by name, in input order
        settled: final records of rows, of this start or an earlier one
        unjournaled: those of them that are not yet in the journal
        batches: names of rows that go through the model together, of those still to be done
    """

    run: Run
    rows: dict[str, Row]
    settled: dict[str, R] = field(default_factory=dict)
    unjournaled: list[R] = field(default_factory=list)
    batches: list[list[str]] = field(default_factory=list)


def plan_rows(
    settings: TableSettings,
    record: type[R],
    run: Run,
    questioner: RowQuestioner,
    workers: Workers,
    stack: ExitStack,
) -> RowPlan[R]:
    """Find out what is to be done; headers of images are read, no image is decoded.

    Args:
        settings: settings of the recipe
        record: class of the job's records
        run: what answers depend on now
        questioner: counts the tokens of prompts
        workers: read the headers
        stack: keeps the output folder claimed, unless it is a dry run

    Raises:
        ValueError: if another run is at work in the output folder, or what is in it cannot be read.
    """
    begun, past = begin(settings, record, run, stack)
    plan = RowPlan[R](begun, {row.name: row for row in settings.rows})
    for name, row in plan.rows.items():
        known = past.records.get(name)
        if known is not None and _is_final(known, row, settings):
            plan.settled[name] = known
    counts = questioner.count_tokens(list(plan.rows.values()), workers)
    for name, count in counts.items():
        if count.problem and name not in plan.settled:
            failed = row_failure(record, plan.rows[name], count.problem, settings)
            plan.settled[name] = failed
            plan.unjournaled.append(failed)
    batches = plan_batches(
        {name: count.value for name, count in counts.items() if not count.problem},
        batch_size=settings.batch_size,
        batch_tokens=settings.tokens_together(begun.batch_tokens),
        text_tokens=settings.max_new_tokens,
    )
    left = [[name for name in batch if name not in plan.settled] for batch in batches]
    plan.batches = [batch for batch in left if batch]
    return plan


def _is_final(record: RowRecord, row: Row, settings: TableSettings) -> bool:
    if record.asked != settings.asked(row):
        return False
    return record.state == "done" or (record.stamp == row.stamp() and not settings.retry_failed)


def row_failure(record: type[R], row: Row, reason: str, settings: TableSettings) -> R:
    """Make the record of a row that failed."""
    asked, stamp = settings.asked(row), row.stamp()
    return record(row.name, "failed", reason=reason, asked=asked, stamp=stamp)


def show_rows(settings: TableSettings) -> int:
    """Say which rows there are, where a dry run has no model; return the exit code."""
    for row in settings.rows:
        print(f"{row.name}: {row.problem or 'to be asked'}")
    return int(any(row.problem for row in settings.rows))


def show_row_plan(plan: RowPlan[R]) -> int:
    """Say what would be done with every row; return the exit code."""
    for name in plan.rows:
        record = plan.settled.get(name)
        done = f"{record.state}, {record.reason}".rstrip(", ") if record else "to be asked"
        print(f"{name}: {done}")
    states: Counter[str] = Counter(record.state for record in plan.settled.values())
    pending = len(plan.rows) - len(plan.settled)
    print(f"{pending} to be asked in {len(plan.batches)} batches; {summary(states, ROW_STATES)}")
    return int(states["failed"] > 0)
