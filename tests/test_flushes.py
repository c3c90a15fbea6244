"""What is on disk when something is renamed or relied on: a recording stand-in for the calls."""

import os
import stat
from dataclasses import dataclass

import pytest

from torchtune_qwen25vl._files import replacing_folder, write_file
from torchtune_qwen25vl.captioning import Record, write_down
from torchtune_qwen25vl.jobs import Journal, Run, take_up

RUN = Run({"model": "m"}, max_pixels=784, batch_tokens=10, format="fp32")


@dataclass(frozen=True)
class Flushed:
    """A file, and what it held, or a folder, when it was flushed."""

    name: str
    content: bytes | None = None


@dataclass(frozen=True)
class Renamed:
    """A file or folder that took the place of another."""

    name: str


@dataclass(frozen=True)
class Removed:
    """A file that was removed."""

    name: str


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """What was flushed, renamed and removed below `tmp_path`, in order; hidden names are "..."."""
    seen = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def name_of(path):
        parts = os.path.relpath(path, tmp_path).split(os.sep)
        return "/".join("..." if part.startswith(".") and len(part) > 2 else part for part in parts)

    def flushed(descriptor):
        status = os.fstat(descriptor)
        (path,) = (
            p for p in (tmp_path, *tmp_path.rglob("*")) if os.path.samestat(p.stat(), status)
        )
        content = None if stat.S_ISDIR(status.st_mode) else path.read_bytes()
        seen.append(Flushed(name_of(path), content))
        fsync(descriptor)

    def renamed(source, target):
        seen.append(Renamed(name_of(target)))
        replace(source, target)

    def removed(path, **options):
        seen.append(Removed(name_of(path)))
        unlink(path, **options)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(os, "unlink", removed)
    return seen


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, calls):
    (tmp_path / "a.txt").write_text("old")
    write_file(tmp_path / "a.txt", b"new")
    assert calls == [Flushed("...", b"new"), Renamed("a.txt")]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_is_on_disk_before_it_has_its_name(tmp_path, calls, old):
    if old:
        (tmp_path / "step_2").mkdir()
    with replacing_folder(tmp_path / "step_2") as folder:
        (folder / "a").write_text("A")
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("B")
        assert calls == []
    renamed = calls.index(Renamed("..." if old else "step_2"))
    assert set(calls[:renamed]) == {
        Flushed(".../a", b"A"),
        Flushed(".../inner"),
        Flushed(".../inner/b", b"B"),
    }
    assert calls[renamed:] == [Renamed("...")] * old + [Renamed("step_2")]


def test_a_folder_that_was_not_filled_is_not_flushed(tmp_path, calls):
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "step_2"):
        raise KeyboardInterrupt
    assert calls == []


def test_a_journal_is_on_disk_with_every_batch(tmp_path, calls):
    """A new one is in its folder for good; an old one is there already."""
    path = tmp_path / "journal-0.jsonl"
    journal = Journal(tmp_path, 0, RUN)
    header = path.read_bytes()
    assert header.endswith(b"\n")
    assert calls == [Flushed(path.name, header), Flushed(".")]
    journal.add([Record("a", "done")])
    assert calls[2:] == [Flushed(path.name, path.read_bytes())]
    assert len(path.read_bytes()) > len(header)
    journal.close()
    calls.clear()
    Journal(tmp_path, 0, RUN).close()
    assert calls == []


def test_the_journal_knows_a_caption_before_its_text_file_does(tmp_path, calls):
    journal = Journal(tmp_path, 0, RUN)
    calls.clear()
    write_down(journal, [Record("a", "done", "A dog.", file=str(tmp_path / "a.txt"))])
    first, text, place, second = calls
    assert b"A dog." in first.content
    assert b'"placed": false' in first.content
    assert (text, place) == (Flushed("...", b"A dog.\n"), Renamed("a.txt"))
    assert b'"placed": true' in second.content
    journal.close()


def test_the_journals_of_other_ranks_go_when_they_are_in_the_first(tmp_path, calls):
    for rank, name in enumerate("ab"):
        journal = Journal(tmp_path, rank, RUN)
        journal.add([Record(name, "done")])
        journal.close()
    calls.clear()
    take_up(tmp_path, Record, RUN, complete=lambda one: one, restart=False, dry_run=False)
    merged, place, gone = calls
    assert b'"a"' in merged.content
    assert b'"b"' in merged.content
    assert (place, gone) == (Renamed("journal-0.jsonl"), Removed("journal-1.jsonl"))
