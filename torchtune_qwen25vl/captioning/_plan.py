"""What is to be done with each item, from what is on disk already."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torchtune_qwen25vl.captioning._items import Item
from torchtune_qwen25vl.captioning._journal import Past, Record, State
from torchtune_qwen25vl.captioning._outputs import (
    EXISTING,
    FORMATS,
    Existing,
    TextFiles,
    combined,
    read_text,
    write_text,
)
from torchtune_qwen25vl.captioning._prompts import printable


@dataclass(frozen=True)
class Policy:
    """What becomes of captions, old and new.

    Attributes:
        formats: what is written, of txt, jsonl, csv
        text_files: where each text file lies
        existing: what becomes of a caption that is there already
        write_states: of a new caption, for it to get a text file
        uses_existing: whether the prompt tells the model the existing caption
    """

    formats: Sequence[str]
    text_files: TextFiles
    existing: Existing
    write_states: Sequence[State]
    uses_existing: bool

    def __post_init__(self) -> None:
        for name, values, kinds in (
            ("outputs", self.formats, FORMATS),
            ("existing", [self.existing], EXISTING),
            ("write_states", self.write_states, ("done", "cut", "looped")),
        ):
            if not values or not set(values) <= set(kinds):
                raise ValueError(f"{name} is of {', '.join(kinds)}, got {list(values)}")


@dataclass
class Plan:
    """Items in input order, and what is known of them.

    Attributes:
        items: by name
        texts: their text files, where such are written
        existing: captions they had before
        settled: those that are done, in this run or before
    """

    items: dict[str, Item]
    texts: dict[str, Path] = field(default_factory=dict)
    existing: dict[str, str] = field(default_factory=dict)
    settled: dict[str, Record] = field(default_factory=dict)

    @property
    def pending(self) -> list[Item]:
        """Items that are still to be captioned."""
        return [item for name, item in self.items.items() if name not in self.settled]

    @property
    def to_batch(self) -> list[Item]:
        """Items that go, or went, through the model in this run: batches are made of them all."""
        return [
            item
            for name, item in self.items.items()
            if name not in self.settled or self.settled[name].state != "skipped"
        ]


def make_plan(
    items: Iterable[Item],
    policy: Policy,
    past: Past,
    table: Mapping[str, str],
    *,
    retry_failed: bool,
) -> Plan:
    """Decides for each item whether it is to be captioned.

    Args:
        items: in input order
        policy: of captions
        past: of this run
        table: captions in the tables of an earlier run
        retry_failed: caption again what failed

    Raises:
        ValueError: if an image inside a table cannot have a text file.
    """
    plan = Plan({item.name: item for item in items})
    owners: dict[Path, str] = {}
    for name, item in plan.items.items():
        problem = item.problem
        if not problem and "txt" in policy.formats:
            plan.texts[name] = path = policy.text_files.path(item)
            if (owner := owners.setdefault(path, name)) != name:
                problem = f"{path.name} belongs to {Path(owner).name}: set text_naming=full"
        record = past.records.get(name)
        if record is not None and not (retry_failed and record.state == "failed"):
            plan.settled[name] = record
            continue
        plan.existing[name], unreadable = _existing(plan, item, table)
        if unreadable and (policy.uses_existing or policy.existing in ("append", "prepend")):
            problem = problem or unreadable
        if problem:
            plan.settled[name] = Record(name, "failed", reason=problem)
        elif policy.existing == "skip" and (plan.existing[name] or unreadable):
            reason = unreadable or "it has a caption"
            plan.settled[name] = Record(name, "skipped", plan.existing[name], reason)
    return plan


def _existing(plan: Plan, item: Item, table: Mapping[str, str]) -> tuple[str, str]:
    """The caption an image has, and why it cannot be read."""
    text = table.get(printable(item.name), "") or item.caption
    if item.name not in plan.texts:
        return text, ""
    try:
        return read_text(plan.texts[item.name]) or text, ""
    except ValueError as error:
        return "", str(error)


def with_file(record: Record, plan: Plan, policy: Policy) -> Record:
    """A new record with the existing caption in its own, and the text file it goes into."""
    if record.state == "failed":
        return record
    existing = plan.existing.get(record.name, "")
    caption = combined(existing, record.caption, policy.existing)
    written = record.name in plan.texts and record.state in policy.write_states
    file = str(plan.texts[record.name]) if written else ""
    return replace(record, caption=caption, file=file)


def place(record: Record) -> Record:
    """Writes the text file of a record, if it has one; failed where that cannot be done."""
    if record.state == "failed" or not record.file:
        return record
    try:
        write_text(Path(record.file), record.caption)
    except OSError as error:
        return replace(record, state="failed", reason=f"its caption is not written: {error}")
    return record
