"""A run from its settings to its plan, and from its records to its files."""

import json
import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from torchtune_qwen25vl.device import LoadedModel
from torchtune_qwen25vl.hidden_states._columns import make_file
from torchtune_qwen25vl.hidden_states._halp import refuse_others, write_parts
from torchtune_qwen25vl.hidden_states._layout import DTYPES, Layout
from torchtune_qwen25vl.hidden_states._records import STATES, Record, digest
from torchtune_qwen25vl.hidden_states._selectors import read_selectors
from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.hidden_states._states import open_states
from torchtune_qwen25vl.hidden_states._table import FILE as TABLE
from torchtune_qwen25vl.hidden_states._table import write_table
from torchtune_qwen25vl.jobs import (
    Row,
    RowQuestioner,
    Run,
    Workers,
    claimed,
    name_failed,
    plan_batches,
    read_journals,
    summary,
    take_up,
)
from torchtune_qwen25vl.model import qwen2_5_vl_from_config

logger = logging.getLogger(__name__)
LAYER = "output of decoder block K before the final norm, hidden_states[K + 1] of transformers"


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


def layout_of(settings: Settings, model: LoadedModel) -> Layout:
    """Return what the states of a run are; no weight is read.

    Raises:
        ValueError: if a selector is none, asks for a block that is not there, or has no place in
            the format.
    """
    with torch.device("meta"):
        shape = qwen2_5_vl_from_config(model.settings / "config.json")
    blocks = {"num_layers": len(shape.layers), "vision_num_layers": len(shape.vision.layers)}
    selectors = read_selectors(settings.selectors, **blocks)
    if settings.format == "halp":
        refuse_others(list(selectors.values()), blocks["vision_num_layers"])
    width, vision_width = shape.tok_embeddings.weight.shape[1], shape.vision.patch_embed.proj
    widths = {
        name: vision_width.out_features if one.site == "vision" else width
        for name, one in selectors.items()
    }
    facts = {
        "model": settings.model,
        "dtype": DTYPES[model.choice.dtype],
        **{name: str(count) for name, count in blocks.items()},
        "vision_boundary": settings.vision_boundary,
        "layer_K": LAYER,
        "selectors": json.dumps(list(selectors)),
        "widths": json.dumps(widths),
    }
    ids = [row.name for row in settings.rows]
    return Layout(ids, selectors, widths, model.choice.dtype, facts)


def plan_run(
    settings: Settings,
    run: Run,
    layout: Layout,
    questioner: RowQuestioner,
    workers: Workers,
    stack: ExitStack,
) -> Plan:
    """Find out what is to be done; headers of images are read, no image is decoded.

    Args:
        settings: of the recipe
        run: what states depend on now
        layout: of the states
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
    if not settings.dry_run:
        done = {name for name, record in plan.settled.items() if record.state == "done"}
        make_file(settings.folder, layout, done)
    counts = questioner.count_tokens(list(plan.rows.values()), workers)
    for name, count in counts.items():
        if count.problem and name not in plan.settled:
            record = failure(plan.rows[name], count.problem, settings)
            plan.settled[name] = record
            plan.unjournaled.append(record)
    batches = plan_batches(
        {name: count.value for name, count in counts.items() if not count.problem},
        batch_size=settings.batch_size,
        batch_tokens=settings.tokens_together(past.run.batch_tokens),
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


def show_rows(settings: Settings) -> int:
    """Say which rows there are, where a dry run has no model; return the exit code."""
    for row in settings.rows:
        print(f"{row.name}: {row.problem or 'to be asked'}")
    return int(any(row.problem for row in settings.rows))


def show_plan(plan: Plan) -> int:
    """Say what would be done with every row; return the exit code."""
    for name in plan.rows:
        record = plan.settled.get(name)
        done = f"{record.state}, {record.reason}".rstrip(", ") if record else "to be asked"
        print(f"{name}: {done}")
    states: Counter[str] = Counter(record.state for record in plan.settled.values())
    pending = len(plan.rows) - len(plan.settled)
    print(f"{pending} to be asked in {len(plan.batches)} batches; {summary(states, STATES)}")
    return int(states["failed"] > 0)


def write_outputs(settings: Settings, plan: Plan, device: str) -> int:
    """Write the table, and HALP's parts where they are asked for; return the exit code.

    Args:
        settings: of the recipe
        plan: of the run, whose rows all ranks have gone through
        device: that it ran on
    """
    folder = settings.folder
    records = read_journals(folder, Record).records | plan.settled
    write_table(folder, list(plan.rows.values()), records)
    if settings.format == "halp":
        for path in write_parts(folder, open_states(folder), device):
            logger.info("wrote %s", path)
    failed = [records[name] for name in plan.rows if records[name].state == "failed"]
    name_failed([f"{one.name}: {one.reason}" for one in failed], f"{folder / TABLE} names")
    states: Counter[str] = Counter(records[name].state for name in plan.rows)
    logger.info(
        "%d rows: %s; the states are in %s", len(plan.rows), summary(states, STATES), folder
    )
    return int(bool(failed))
