"""A run from its settings to its plan, and from its records to its files."""

import json
import logging
from collections import Counter
from contextlib import ExitStack

import torch

from torchtune_qwen25vl.device import LoadedModel
from torchtune_qwen25vl.hidden_states._columns import make_file
from torchtune_qwen25vl.hidden_states._halp import refuse_others, write_parts
from torchtune_qwen25vl.hidden_states._layout import DTYPES, Layout
from torchtune_qwen25vl.hidden_states._records import Record
from torchtune_qwen25vl.hidden_states._selectors import read_selectors
from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.hidden_states._states import open_states
from torchtune_qwen25vl.hidden_states._table import FILE as TABLE
from torchtune_qwen25vl.hidden_states._table import write_table
from torchtune_qwen25vl.jobs import (
    ROW_STATES,
    RowPlan,
    RowQuestioner,
    Run,
    Workers,
    name_failed,
    plan_rows,
    read_journals,
    summary,
)
from torchtune_qwen25vl.model import qwen2_5_vl_from_config

logger = logging.getLogger(__name__)
LAYER = "output of decoder block K before the final norm, hidden_states[K + 1] of transformers"


Plan = RowPlan[Record]


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
        settings: settings of the recipe
        run: what states depend on now
        layout: of the states
        questioner: counts the tokens of prompts
        workers: read the headers
        stack: keeps the output folder claimed, unless it is a dry run

    Raises:
        ValueError: if another run is at work in the output folder, or what is in it cannot be read.
    """
    plan = plan_rows(settings, Record, run, questioner, workers, stack)
    if not settings.dry_run:
        done = {name for name, record in plan.settled.items() if record.state == "done"}
        make_file(settings.folder, layout, done)
    return plan


def write_outputs(settings: Settings, plan: Plan, device: str) -> int:
    """Write the table, and HALP's parts where they are asked for; return the exit code.

    Args:
        settings: settings of the recipe
        plan: plan of the run, whose rows all ranks have gone through
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
        "%d rows: %s; the states are in %s", len(plan.rows), summary(states, ROW_STATES), folder
    )
    return int(bool(failed))
