"""What is to be done with each item, from what is on disk already."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torchtune_qwen25vl.captioning._prompts import Wording, printable
from torchtune_qwen25vl.captioning._records import Record, State, stamp_of
from torchtune_qwen25vl.captioning._texts import (
    EXISTING,
    Existing,
    TextFiles,
    read_text,
)
from torchtune_qwen25vl.jobs import Item, Past

FORMATS = ("txt", "jsonl", "csv", "metadata")

_APART = "set text_naming=full, or give them mirror folders of their own"


@dataclass(frozen=True)
class Policy:
    """What becomes of captions, old and new.

    Attributes:
        formats: formats that are written, of txt, jsonl, csv, metadata
        text_files: place of each text file
        existing: what becomes of a caption that is there already
        write_states: states in which a new caption gets a text file
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
        settled: final records, of this run or of an earlier start of it
        unjournaled: those of them that are not yet in the journal
    """

    items: dict[str, Item]
    texts: dict[str, Path] = field(default_factory=dict)
    existing: dict[str, str] = field(default_factory=dict)
    settled: dict[str, Record] = field(default_factory=dict)
    unjournaled: list[Record] = field(default_factory=list)

    def settle(self, record: Record) -> None:
        """Note how an image ended, for the journal too."""
        self.settled[record.name] = record
        self.unjournaled.append(record)

    def keep(self, record: Record, *, edited: bool) -> None:
        """Take a final record; the journal does not have it yet if its caption was edited."""
        self.settled[record.name] = record
        if edited and record.state != "failed":
            self.unjournaled.append(record)

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
    past: Past[Record],
    table: Mapping[str, str],
    *,
    retry: Collection[str],
) -> Plan:
    """Decide for each item whether it is to be captioned.

    Args:
        items: all images, in input order
        policy: what becomes of captions
        past: records of this run
        table: captions in the tables of an earlier run, by name
        retry: states of images that are captioned again

    Raises:
        ValueError: if an image inside a table cannot have a text file, or images that have captions
            would have one text file.
    """
    plan = Plan({item.name: item for item in items})
    records = (past.records[name] for name in plan.items if name in past.records)
    owners = {Path(record.file): record.name for record in records if record.file}
    for name, item in plan.items.items():
        shared = ""
        if not item.problem and "txt" in policy.formats:
            path = policy.text_files.path(item)
            if (owner := owners.setdefault(path, name)) == name:
                plan.texts[name] = path
            else:
                shared = f"its text file {path.name} is that of {Path(owner).name} too: {_APART}"
        before = past.records.get(name)
        record = before and _as_edited(before)
        if record is not None and _is_final(record, item, retry):
            if shared and record.state in policy.write_states:
                raise ValueError(f"{printable(name)} has a caption, but {shared}")
            plan.keep(record, edited=record != before)
            continue
        problem = item.problem or shared
        try:
            plan.existing[name], unreadable = (
                ("", "") if _is_ours(record) else _existing(item, plan.texts.get(name), table)
            )
        except OSError as error:
            problem, unreadable = problem or f"its text file cannot be read: {error}", ""
        if unreadable and (policy.uses_existing or policy.existing in ("append", "prepend")):
            problem = problem or unreadable
        if problem:  # which is looked for at each start: not for the journal
            plan.settled[name] = Record(name, "failed", reason=problem)
        elif policy.existing == "skip" and (plan.existing[name] or unreadable):
            skipped = _skipped(name, plan.existing[name], unreadable, plan.texts.get(name))
            plan.settled[name] = skipped  # for as long as it has: not for the journal
            if record is not None and record.state == "failed":  # as the journal says
                plan.unjournaled.append(skipped)
    return plan


def _skipped(name: str, existing: str, unreadable: str, text_file: Path | None) -> Record:
    """Make the record of an image that has a caption; its text file is named if it lacks that."""
    has_text = text_file is None or unreadable or read_text(text_file)
    file = "" if has_text else str(text_file)
    return Record(name, "skipped", existing, unreadable or "it has a caption", file=file)


def _is_ours(record: Record | None) -> bool:
    """Whether a text file holds an answer that is asked for again."""
    return record is not None and record.placed and record.state != "skipped"


def _is_final(record: Record, item: Item, retry: Collection[str]) -> bool:
    if record.state == "failed":
        has_come_back = record.absent and item.path is not None and os.path.exists(item.path)
        is_mended = bool(record.stamp) and stamp_of(item.path) not in ("", record.stamp)
        return not ("failed" in retry or has_come_back or is_mended)
    # skipped it is for as long as it has a caption
    return record.state != "skipped" and record.state not in retry


def _as_edited(record: Record) -> Record:
    """Return a record with the words that its text file holds now.

    It is done if a person has written them, and has failed for as long as they cannot be read.
    """
    file = Path(record.file)
    if not record.placed or record.state == "skipped" or not os.path.lexists(file):
        return record
    try:
        text = read_text(file)
    except (OSError, ValueError) as error:
        return replace(record, state="failed", reason=f"its text file cannot be read: {error}")
    if text == record.caption.strip():
        return record
    return replace(record, caption=text, state="done")


def _existing(item: Item, text_file: Path | None, table: Mapping[str, str]) -> tuple[str, str]:
    """Find the caption an image has, and say why one cannot be read: it is not UTF-8.

    Raises:
        OSError: if its text file can neither be read nor, then, be written.
    """
    known = printable(item.texts.get("caption", ""))
    if text_file is None:
        return table.get(printable(item.name), "") or known, ""
    try:
        return read_text(text_file) or known, ""
    except ValueError as error:
        return "", str(error)


def moved(plan: Plan, policy: Policy) -> tuple[list[Record], list[Record]]:
    """Find captions whose text file is gone, or is to lie elsewhere or under another name.

    Returns:
        Their records with the file that is to be written, and those whose new file is there
        already: it is somebody's, and stays unless the policy is to overwrite.
    """
    found: tuple[list[Record], list[Record]] = ([], [])
    for record in plan.settled.values():
        file = _text_file(record, plan, policy)
        if record.state == "skipped" and record.file:  # its caption is known by a table alone
            found[False].append(record)
        if record.state in ("failed", "skipped") or not file:
            continue
        is_there = os.path.lexists(file)
        if file != record.file or not is_there:
            stays = policy.existing != "overwrite" and is_there
            found[stays].append(replace(record, file=file, placed=False))
    return found


def with_file(record: Record, plan: Plan, policy: Policy, wording: Wording) -> Record:
    """Return a new record with the existing caption in its own, and its text file named."""
    if record.state == "failed":
        return record
    existing = plan.existing.get(record.name, "")
    caption = wording.joined(existing, record.caption, policy.existing)
    return replace(record, caption=caption, file=_text_file(record, plan, policy))


def _text_file(record: Record, plan: Plan, policy: Policy) -> str:
    """Where the caption of a record goes; empty where it gets no text file."""
    written = record.name in plan.texts and record.state in policy.write_states
    return str(plan.texts[record.name]) if written else ""
