"""Captions that a user has changed on the review page, and saved there as JSON lines."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import replace

from torchtune_qwen25vl.captioning._plan import Plan, make_plan
from torchtune_qwen25vl.captioning._prompts import printable
from torchtune_qwen25vl.captioning._records import Record, place, write_down
from torchtune_qwen25vl.captioning._run import list_items, write_outputs
from torchtune_qwen25vl.captioning._settings import Settings
from torchtune_qwen25vl.captioning._tables import read_edits, read_table
from torchtune_qwen25vl.jobs import (
    Journal,
    Workers,
    as_path,
    claimed,
    read_journals,
    take_up,
)

logger = logging.getLogger(__name__)


def apply_edits(settings: Settings, workers: Workers, stack: ExitStack) -> int:
    """Write edited captions into journal, text files, tables and page; return the exit code.

    No model is asked: images without a caption stay without one, and are not in the tables.

    Args:
        settings: of the recipe; `apply` names the edits
        workers: read the images for the page
        stack: keeps the output folder claimed, unless it is a dry run

    Raises:
        ValueError: if no run was in the output folder, or the edits cannot be read.
    """
    assert settings.apply is not None
    edits, folder = read_edits(as_path(settings.apply)), settings.folder
    if (run := read_journals(folder, Record).run) is None:
        raise ValueError(f"edits are of a run, and there was none in {folder}: set output_dir")
    items = list_items(settings)
    if not settings.dry_run:
        stack.enter_context(claimed(folder))
    past = take_up(folder, Record, run, complete=place, restart=False, dry_run=settings.dry_run)
    plan = make_plan(items, settings.policy, past, read_table(folder, {"failed"}), retry=())
    records = _edited(plan, edits)
    missing = sorted(set(edits) - set(map(printable, plan.items)))
    if missing:
        logger.error("%d edits are of no image here, such as %s", len(missing), ascii(missing[0]))
    if settings.dry_run:
        for record in records:
            print(printable(f"{record.name}: edited, {record.file or folder}"))
        return int(bool(missing))
    with closing(Journal[Record](folder, 0, run)) as journal:
        journal.add(plan.unjournaled)
        ended = write_down(journal, records)
    logger.info("%d edits applied", sum(record.state != "failed" for record in ended))
    for record in ended:
        plan.settled[record.name] = record
    for item in plan.pending:
        del plan.items[item.name]
    return max(write_outputs(settings, plan, workers), int(bool(missing)))


def _edited(plan: Plan, edits: Mapping[str, str]) -> list[Record]:
    """Make the records of edits; what a person wrote is done, however the answer had ended."""
    records = []
    for name, item in plan.items.items():
        if (caption := edits.get(printable(name))) is not None and not item.problem:
            before = plan.settled.get(name) or Record(name, "done")
            file = str(plan.texts.get(name, before.file))
            done = replace(before, state="done", caption=caption, reason="", absent=False)
            records.append(replace(done, file=file, placed=False))
    return records
