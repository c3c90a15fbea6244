"""A run over prompts: what is to be done, what was done, and how it ended."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from torchtune_qwen25vl.conditioning._batches import Embedded, facts_of
from torchtune_qwen25vl.conditioning._settings import Settings
from torchtune_qwen25vl.conditioning._store import file_name, write_embeds
from torchtune_qwen25vl.jobs import (
    JobSettings,
    Journal,
    Row,
    Run,
    begin,
    name_failed,
    read_journals,
    summary,
)

logger = logging.getLogger(__name__)
State = Literal["done", "failed"]
STATES: tuple[State, ...] = get_args(State)
VERSION = version("torchtune-qwen25vl")


@dataclass(frozen=True)
class Record:
    """How one prompt ended.

    Attributes:
        name: name of the row
        state: done, or failed for `reason`
        reason: why it failed
        asked: digest of the prompt and its images; of another one the file counts for nothing
        tokens: kept of the prompt
        note: what else is to be known of the result
    """

    name: str
    state: State
    reason: str = ""
    asked: str = ""
    tokens: int = 0
    note: str = ""


@dataclass
class Plan:
    """What all ranks have to know.

    Attributes:
        run: as it was begun, perhaps by an earlier start
        rows: rows by name, in input order
        settled: final records, of an earlier start
        batches: names of rows that are embedded together, of those still to be done
    """

    run: Run
    rows: dict[str, Row]
    settled: dict[str, Record] = field(default_factory=dict)
    batches: list[list[str]] = field(default_factory=list)


def plan_run(
    settings: JobSettings,
    run: Run,
    rows: Sequence[Row],
    place: Callable[[str], Path],
    stack: ExitStack,
) -> Plan:
    """Find out what is to be done; no image is read.

    What is done is done again where its file is gone, or its prompt or images are others; what
    failed where its images have changed, or with retry_failed.

    Args:
        settings: settings of the recipe
        run: what results depend on now
        rows: the prompts
        place: returns the file of a row's result, by its name
        stack: keeps the output folder claimed, unless it is a dry run

    Raises:
        ValueError: if another run is at work in the output folder, or what is in it cannot be read.
    """
    begun, past = begin(settings, Record, run, stack)
    plan = Plan(begun, {row.name: row for row in rows})
    for name, row in plan.rows.items():
        record = past.records.get(name)
        if record is None or record.asked != digest(row):
            continue
        if place(name).is_file() if record.state == "done" else not settings.retry_failed:
            plan.settled[name] = record
    left = [name for name in plan.rows if name not in plan.settled]
    step = settings.batch_size
    plan.batches = [left[k : k + step] for k in range(0, len(left), step)]
    return plan


def path_of(settings: Settings, name: str) -> Path:
    """Return the file of a prompt."""
    return settings.folder / file_name(name, settings.layout, settings.task)


def digest(row: Row) -> str:
    """Name a prompt and its images, as they are now."""
    asked = repr((row.text, row.image_id, len(row.sources), row.stamp(), row.problem))
    return hashlib.sha256(asked.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def write_down(
    settings: Settings,
    plan: Plan,
    journal: Journal[Record],
    embedded: Sequence[Embedded],
    problems: Mapping[str, str],
) -> list[Record]:
    """Write the files of a batch, and then its records; return these."""
    records = []
    for one in embedded:
        name = one.prompt.row.name
        if one.embeds is None:
            problems = {**problems, name: one.problem}
            continue
        facts = facts_of(one.prompt, settings, VERSION)
        write_embeds(path_of(settings, name), one.embeds, layout=settings.layout, facts=facts)
        asked = digest(one.prompt.row)
        records.append(Record(name, "done", asked=asked, tokens=len(one.embeds)))
    for name, reason in problems.items():
        records.append(Record(name, "failed", reason=reason, asked=digest(plan.rows[name])))
    journal.add(records)
    return records


def show_plan(plan: Plan) -> int:
    """Say what would be done with every prompt; return the exit code."""
    for name, row in plan.rows.items():
        record = plan.settled.get(name)
        done = f"{record.state}, {record.reason}".rstrip(", ") if record else "to be done"
        print(f"{name}: {row.problem or done}")
    states: Counter[str] = Counter(record.state for record in plan.settled.values())
    pending = len(plan.rows) - len(plan.settled)
    print(f"{pending} to be done in {len(plan.batches)} batches; {summary(states, STATES)}")
    return int(states["failed"] > 0 or any(row.problem for row in plan.rows.values()))


def records_of(settings: JobSettings, plan: Plan) -> dict[str, Record]:
    """Return how every prompt ended, by name."""
    return read_journals(settings.folder, Record).records | plan.settled


def finish(settings: JobSettings, plan: Plan, what: str = "embeddings") -> int:
    """Say how the run ended; return the exit code."""
    records = records_of(settings, plan)
    failed = [records[name] for name in plan.rows if records[name].state == "failed"]
    others = f"the journal in {settings.folder} names"
    name_failed([f"{one.name}: {one.reason}" for one in failed], others)
    states: Counter[str] = Counter(records[name].state for name in plan.rows)
    logger.info(
        "%d prompts: %s; the %s are in %s",
        len(plan.rows),
        summary(states, STATES),
        what,
        settings.folder,
    )
    return int(bool(failed))
