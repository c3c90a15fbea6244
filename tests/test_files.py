"""Folders are written whole or not at all."""

import errno
import os

import pytest

from torchtune_qwen25vl import _files
from torchtune_qwen25vl._files import recover_folders, replacing_folder, write_file


def fill(target, content):
    with replacing_folder(target) as folder:
        (folder / "file").write_text(content)
        assert not (target / "file").exists() or (target / "file").read_text() == "old"


@pytest.fixture
def target(tmp_path):
    fill(tmp_path / "epoch_0", "old")
    return tmp_path / "epoch_0"


def test_a_new_folder_takes_the_place_of_the_old(target):
    assert (target / "file").read_text() == "old"
    fill(target, "new")
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["epoch_0"]


def test_an_interrupted_write_leaves_the_old_folder(target):
    def half_written(folder):
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing_folder(target) as folder:
        half_written(folder)
    assert (target / "file").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["epoch_0"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_rename_leaves_the_old_folder(target, monkeypatch, failing):
    calls, replace = [], os.replace

    def fail_once(source, destination):
        calls.append(source)
        if len(calls) == failing + 1:
            raise OSError("no space left")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(OSError, match="no space"):
        fill(target, "new")
    assert (target / "file").read_text() == "old"


def test_a_crash_between_the_renames_is_repaired(target):
    os.replace(target, target.with_name(".epoch_0.replaced"))  # and then the power failed
    recover_folders(target.parent)
    assert (target / "file").read_text() == "old"


def test_a_crash_after_the_renames_is_in_nobodys_way(target):
    leftover = target.with_name(".epoch_0.replaced")
    leftover.mkdir()
    (leftover / "file").write_text("older")
    fill(target, "new")
    assert (target / "file").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["epoch_0"]


def test_a_crash_between_the_renames_is_repaired_before_the_next_write(target):
    os.replace(target, target.with_name(".epoch_0.replaced"))
    with pytest.raises(KeyboardInterrupt), replacing_folder(target):
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "old"


def test_a_crash_while_writing_is_cleared_away_by_the_next_write(target):
    leftover = target.with_name(".epoch_0.building")
    leftover.mkdir()
    (leftover / "other").write_text("half")
    fill(target, "new")
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["epoch_0"]


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, "write failed"), 10**9),
        (Exception("I/O error: No space left on device (os error 28)"), 10**9),  # safetensors'
        (RuntimeError("PytorchStreamWriter failed writing file"), 0),  # torch.save's
    ],
)
def test_a_full_disk_is_named_and_the_old_folder_stays(target, monkeypatch, error, free):
    monkeypatch.setattr(_files, "_free", lambda path: free)
    said = r"no space left on the disk of .*epoch_0, .*is whole. Free"
    with pytest.raises(OSError, match=said), replacing_folder(target):
        raise error
    assert (target / "file").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["epoch_0"]


def test_other_errors_stay_as_they_are(target, monkeypatch):
    monkeypatch.setattr(_files, "_free", lambda path: 10**9)
    with pytest.raises(RuntimeError, match="another"), replacing_folder(target):
        raise RuntimeError("another")


def test_each_file_is_made_under_a_hidden_name_of_its_own(tmp_path, monkeypatch):
    """Ranks write into one folder at once; what a killed run left is replaced by the next."""
    hidden, replace = [], os.replace

    def record(source, target):
        hidden.append(source.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    for name in ("a.txt", "b.txt", "a.txt"):
        write_file(tmp_path / name, b"text")
    assert hidden[0] == hidden[2] != hidden[1]
    assert all(name.startswith(".") for name in hidden)
