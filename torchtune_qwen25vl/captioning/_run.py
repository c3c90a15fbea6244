"""A run from its settings to its plan, and from its records to tables and page."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from torchtune_qwen25vl.captioning._plan import Plan, make_plan, moved, with_file
from torchtune_qwen25vl.captioning._prompts import printable
from torchtune_qwen25vl.captioning._records import STATES, Record, failure, place
from torchtune_qwen25vl.captioning._review import write_review
from torchtune_qwen25vl.captioning._settings import Settings
from torchtune_qwen25vl.captioning._tables import read_table, write_metadata, write_tables
from torchtune_qwen25vl.captioning._thumbnails import Thumbnails
from torchtune_qwen25vl.device import LoadedModel
from torchtune_qwen25vl.generation import read_generation_config
from torchtune_qwen25vl.jobs import (
    Answer,
    Item,
    Past,
    Run,
    Workers,
    begin,
    count_tokens,
    find_items,
    name_failed,
    plan_batches,
    read_journals,
    summary,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedRun:
    """What all ranks have to know.

    Attributes:
        run: as it was begun, perhaps by an earlier start
        plan: what is to be done with each item
        batches: names of images that go through the model together, of those still to be captioned
    """

    run: Run
    plan: Plan
    batches: list[list[str]]


def plan_run(settings: Settings, run: Run, workers: Workers, stack: ExitStack) -> PlannedRun:
    """Find out what is to be done; headers of images are read, no image is decoded.

    Args:
        settings: settings of the recipe
        run: what captions depend on now
        workers: read the headers
        stack: keeps the output folder claimed, unless it is a dry run

    Raises:
        ValueError: if there are no images, another run is at work in the output folder, or what is
            in it cannot be read.
    """
    items = list_items(settings)
    begun, past = begin(settings, Record, run, stack, complete=place)
    table = read_table(settings.folder, {"failed", *settings.retried})
    plan = make_plan(items, settings.policy, past, table, retry=settings.retried)
    if not settings.dry_run:
        _make_mirror(plan, settings, past)
        _move_texts(plan, settings)
    return PlannedRun(begun, plan, _plan_batches(plan, settings, begun, workers))


def tell_unused(settings: Settings, model: LoadedModel) -> None:
    """Log what the model's generation_config.json asks for and captions do not follow."""
    used = settings.full_preset
    try:
        asked = read_generation_config(model.settings)._asdict()
    except ValueError as error:
        logger.info("%s; captions do not follow that file", error)
        return
    unused = {name: value for name, value in asked.items() if value != getattr(used, name)}
    if unused:
        said = ", ".join(f"{name} {value}" for name, value in unused.items())
        logger.info(
            "generation_config.json of the model asks for %s; captions are chosen as preset %s and "
            "the keys of this run say",
            *(said, settings.preset),
        )


def list_items(settings: Settings) -> list[Item]:
    """List the images of all inputs, with the texts that a table has for them."""
    columns = settings.columns
    texts = {"caption": columns.caption, "tags": columns.tags}
    return find_items(
        settings.sources,
        image_column=columns.image,
        text_columns={kind: name for kind, name in texts.items() if name is not None},
        recursive=settings.recursive,
        exclude=settings.excluded,
        text_suffix=settings.text_suffix,
    )


def _make_mirror(plan: Plan, settings: Settings, past: Past[Record]) -> None:
    """Make the folders of the mirror.

    Raises:
        ValueError: if the mirror is gone with captions that were written into it.
    """
    mirror = settings.policy.text_files.mirror
    if mirror is None or not plan.texts:
        return
    placed = [Path(record.file) for record in past.records.values() if record.placed]
    if not mirror.exists() and any(path.is_relative_to(mirror) for path in placed):
        raise ValueError(
            f"captions were written into mirror_dir {mirror}, which is gone: put it back, or make "
            "an empty folder of that name to have them written again"
        )
    for folder in {path.parent for path in plan.texts.values()}:
        with suppress(OSError):  # then captions in it fail, each for that reason
            folder.mkdir(parents=True, exist_ok=True)


def _move_texts(plan: Plan, settings: Settings) -> None:
    """Write captions that are known into text files that are gone, or are asked for now.

    An image whose folder is gone with its text file has failed for as long as the folder is.
    """
    records, left = moved(plan, settings.policy)
    for record in records:
        before, placed = plan.settled[record.name], place(record)
        if placed.state != "failed":
            plan.settle(placed)
        elif before.file == record.file:
            plan.settled[record.name] = placed  # not for the journal, which knows the caption
        else:
            raise ValueError(f"{record.name}: {placed.reason}; what is done stays as it was")
    if left:
        logger.warning(
            "%d text files that are there stay as they are, such as %s; existing=overwrite "
            "replaces them",
            *(len(left), ascii(left[0].file)),
        )


def _plan_batches(plan: Plan, settings: Settings, run: Run, workers: Workers) -> list[list[str]]:
    """Make the batches of the whole run, and leave out what is settled.

    An image whose header cannot be read has failed.
    """
    counts = count_tokens(plan.to_batch, workers, settings.min_pixels, run.max_pixels)
    for name, count in counts.items():
        if count.problem and name not in plan.settled:
            plan.settle(failure(name, count.problem, plan.items[name].path))
    batches = plan_batches(
        {name: count.value for name, count in counts.items() if not count.problem},
        batch_size=settings.batch_size,
        batch_tokens=settings.tokens_together(run.batch_tokens),
        text_tokens=settings.text_tokens,
    )
    left = [[name for name in batch if name not in plan.settled] for batch in batches]
    return [batch for batch in left if batch]


def show_plan(settings: Settings, planned: PlannedRun) -> int:
    """Say what would be done with every image; return the exit code."""
    plan = planned.plan
    moves = {record.name for record in moved(plan, settings.policy)[0]}
    for name in plan.items:
        record = plan.settled.get(name)
        file = plan.texts.get(name, settings.folder)
        if name in moves:
            word = f"has a caption, to be written to {file}"
        elif record:
            word = f"{record.state}, {record.reason}"
        else:
            word = f"to be captioned, {file}"
        print(printable(f"{name}: {word}"))
    states: Counter[str] = Counter(record.state for record in plan.settled.values())
    pending, batches = len(plan.pending), len(planned.batches)
    print(f"{pending} to be captioned in {batches} batches; {summary(states, STATES)}")
    return int(states["failed"] > 0)


def records_of(
    answers: Sequence[Answer], problems: Mapping[str, str], settings: Settings, plan: Plan
) -> list[Record]:
    """Make the records of a batch.

    Args:
        answers: of the model
        problems: why the other images were not asked about, by name
        settings: settings of the recipe
        plan: names the text files, and knows the captions that were there before
    """
    answered = [
        with_file(_record(answer, settings), plan, settings.policy, settings.wording)
        for answer in answers
    ]
    failed = [failure(name, why, plan.items[name].path) for name, why in problems.items()]
    return answered + failed


def _record(answer: Answer, settings: Settings) -> Record:
    question, is_empty = answer.question, not (answer.text or answer.reason)
    return Record(
        question.name,
        "failed" if is_empty else answer.state,
        settings.wording.around(answer.text) if answer.text else "",
        "the answer is empty" if is_empty else answer.reason,
        answer.tokens,
        question.max_pixels,
        "; ".join(question.steps),
    )


def write_outputs(settings: Settings, plan: Plan, workers: Workers) -> int:
    """Write tables and review page of what all ranks did; return the exit code.

    Args:
        settings: settings of the recipe
        plan: plan of the run
        workers: read images for the page that have no thumbnail yet

    Raises:
        ValueError: if the output folder is gone.
    """
    folder = settings.folder
    if not folder.is_dir():
        raise ValueError(f"{folder} is gone: put it back and start again to have its tables")
    written = read_journals(folder, Record).records
    records = [plan.settled.get(name) or written[name] for name in plan.items]
    items = list(plan.items.values())
    relative = settings.table_paths == "relative"
    write_tables(folder, settings.policy.formats, items, records, relative=relative)
    if "metadata" in settings.policy.formats:
        write_metadata(items, records, settings.policy.write_states)
    if settings.review:
        page = folder / "review.html"
        thumbnails = Thumbnails(folder)
        write_review(page, records, thumbnails.read(items, workers))
        thumbnails.keep(items)
        logger.info("look through the captions in %s", page)
    failed = [_with_name(record) for record in records if record.state == "failed"]
    name_failed(failed, f"the tables in {folder} name")
    states: Counter[str] = Counter(record.state for record in records)
    logger.info("%d images: %s", len(records), summary(states, STATES))
    return int(states["failed"] > 0)


def _with_name(record: Record) -> str:
    known = record.name in record.reason
    return printable(record.reason if known else f"{record.name}: {record.reason}")
