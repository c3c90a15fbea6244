"""How a run ends: its exit code and its last line, whatever happened to it."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import captions
import forked
import pytest
from huggingface_hub import constants

from torchtune_qwen25vl import _cli
from torchtune_qwen25vl.generation import NotFiniteError, RunningBatch

COMMAND = "import sys; from torchtune_qwen25vl._cli import caption; sys.exit(caption())"
SMALL = ["device=cpu", "min_pixels=3136", "max_pixels=25088", "outputs=[txt,jsonl]"]


@pytest.mark.parametrize("step", ["write_text", "write_tables", "_add"])
def test_a_full_disk_is_one_line(run, photos, monkeypatch, caplog, step):
    """Wherever it is noticed; the next start loses nothing."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    places = {
        "write_text": "captioning._records.write_text",
        "write_tables": "captioning._run.write_tables",
        "_add": "jobs._journal._line",
    }
    with monkeypatch.context() as patch:
        patch.setattr(f"torchtune_qwen25vl.{places[step]}", full)
        assert run() == 2
    assert caplog.messages[-1].startswith("the disk is full ([Errno 28]")
    assert caplog.messages[-1].endswith("make room and start again to go on")
    assert "Traceback" not in caplog.text
    assert run() == 0
    assert len(captions.texts(photos)) == 4


def test_a_disk_that_is_full_indeed(model, tmp_path):
    """A real one, of 64 kB: one line behind the bar, and exit code 2."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        photos = captions.write_pictures(tmp_path / "photos", 3)
        (disk / "filler").write_bytes(bytes(56 << 10))
        words = [str(photos), f"output_dir={disk / 'out'}", f"model={model}", *SMALL]
        words += ["max_new_tokens=400", "prompt=" + 999 * "a"]
        code, said = forked.run_command(_cli.caption, words, tmp_path / "said")
        assert code == 2, said
        assert said.splitlines()[-1].startswith("the disk is full")
        assert "Traceback" not in said
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_is_one_line_at_once(tmp_path, workers):
    """While the model is at work and, with workers, an image hangs."""
    model = captions.write_model(tmp_path / "model", ends=0.0)
    photos = captions.write_pictures(tmp_path / "photos", 6)
    if workers:
        os.mkfifo(photos / "picture 900.png")
    words = [str(photos), f"model={model}", f"workers={workers}", "batch_size=1", *SMALL]
    command = [sys.executable, "-c", COMMAND, *words, "max_new_tokens=2000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = photos / "_captions" / "journal-0.jsonl"
    deadline = time.monotonic() + 60
    while not journal.exists() and not workers and time.monotonic() < deadline:
        time.sleep(0.1)
    while workers and not (photos / "_captions").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert time.monotonic() - start < 2
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped, start again to go on"
    assert "Traceback" not in errors
    assert len(children) >= workers
    time.sleep(0.2)
    assert not [child for child in children if Path(f"/proc/{child}/cmdline").exists()
                and Path(f"/proc/{child}/cmdline").read_text()]  # fmt: skip


def test_failed_images_are_named_at_the_end(run, photos, caplog):
    caplog.set_level(logging.INFO)
    for index in range(22):
        (photos / f"bad {index:02}.png").write_bytes(b"no image")
    assert run() == 1
    assert caplog.messages[-22].startswith(f"failed: {photos}/bad 00.png: ")
    assert caplog.messages[-2].startswith("and 2 more, which the tables in ")
    assert "22 failed" in caplog.messages[-1]


def test_a_file_that_was_mended_is_tried_again(run, photos, tmp_path):
    bad, good = photos / "bad.png", (photos / "picture 000.png").read_bytes()
    bad.write_bytes(good[: len(good) // 2])  # its header is whole
    assert run() == 1
    assert run() == 1
    os.utime(bad, (1, 1))  # the control: looked at again, it is as bad as before
    assert run() == 1
    bad.write_bytes(good)
    assert run() == 0
    assert (photos / "bad.txt").read_text() == (photos / "picture 000.txt").read_text()


def test_captions_of_a_state_are_asked_for_again(run, photos, monkeypatch):
    loops = "torchtune_qwen25vl.jobs._answers.loops"
    with monkeypatch.context() as patch:
        patch.setattr(loops, lambda said: True)
        assert run(prefix="old ") == 0
    assert set(captions.states(photos / "_captions").values()) == {"looped"}
    (photos / "picture 001.txt").write_text("Mine.\n")
    before = captions.texts(photos)
    assert run(prefix="old ", retry=["cut"]) == 0
    assert run(prefix="old ", retry_failed=True) == 0
    states = captions.states(photos / "_captions")
    assert sorted(states.values()) == ["done", "looped", "looped", "looped"]  # none again
    assert captions.texts(photos) == before
    assert run(prefix="old ", retry="looped") == 0
    states = captions.states(photos / "_captions")
    assert states["picture 001.png"] == "done"
    assert "looped" not in states.values()
    assert captions.texts(photos) == before  # greedy: the same words
    assert run(retry="done") == 2
    assert run(retry="looped", existing="append") == 2


def test_a_model_that_gives_no_numbers_stops_the_run(run, photos, monkeypatch, caplog):
    def nothing(*_, **__):
        raise NotFiniteError("logits must be finite")

    def first(*arguments):
        """The first image in flight with another, in a batch with it, and alone."""
        calls.append(1)
        return nothing() if len(calls) in (1, 2, 3) else enter(*arguments)

    enter, calls = RunningBatch.enter, []
    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "enter", nothing)
        assert run(batch_size=2) == 2
    assert caplog.messages[-1].startswith("no answer of a batch is finite (logits must be finite")
    assert not captions.texts(photos)
    monkeypatch.setattr(RunningBatch, "enter", first)
    assert run(batch_size=2, retry_failed=True) == 1  # the control: one row alone does not
    assert len(captions.texts(photos)) == 3


@pytest.mark.parametrize("index", range(4))
def test_an_image_without_numbers_fails_alone(run, photos, monkeypatch, index):
    """Also where it is the last one, and nothing else is in flight."""

    def poisoned(self, prompts):
        if any(f"00{index}.png" in prompt.question.name for prompt in prompts):
            raise NotFiniteError("logits must be finite")
        enter(self, prompts)

    enter = RunningBatch.enter
    monkeypatch.setattr(RunningBatch, "enter", poisoned)
    assert run(batch_size=2) == 1
    assert len(captions.texts(photos)) == 3


def test_other_weights_are_another_run(photos, tmp_path, model):
    def run(**changes):
        return captions.caption(copy, photos, existing="overwrite", outputs=["jsonl"], **changes)

    copy = shutil.copytree(model, tmp_path / "copy")
    run()
    assert run() == 0
    assert not list((photos / "_captions").glob("earlier-*"))  # the control
    os.utime(copy / "model.safetensors", (1, 1))
    assert run(dry_run=True) == 0
    assert run() == 0
    assert (photos / "_captions" / "earlier-1-journal-0.jsonl").exists()


def test_a_run_without_captions_binds_nothing(run, photos, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "bad.png").write_bytes(b"no image")
    assert run(bad, dtype="bf16", output_dir=str(tmp_path / "out")) == 1
    assert run(dtype="fp32", output_dir=str(tmp_path / "out"), max_pixels=12544) == 0
    assert run(dtype="bf16", output_dir=str(tmp_path / "out"), max_pixels=12544) == 2


def test_a_mistyped_folder_is_named_at_once(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    words = [str(photos), "model=models/mistyped", *SMALL]
    code, said = forked.run_command(_cli.caption, words, tmp_path / "said")
    assert code == 2
    assert "there is no such folder here: models/mistyped" in said.splitlines()[-1]
    assert "again in" not in said  # nothing is waited for


def test_an_input_that_is_not_there_is_named_before_the_model_is_fetched(photos, tmp_path, caplog):
    missing = tmp_path / "phtos"
    assert captions.caption("owner/nowhere", [photos, missing]) == 2
    (said,) = caplog.messages
    assert f"{missing} does not" in said


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_adapter_is_named(photos, tmp_path, caplog, content):
    (tmp_path / "adapter_config.json").write_text(content)
    assert captions.caption(tmp_path, photos) == 2
    assert str(tmp_path / "adapter_config.json") in caplog.messages[-1]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("named", ["", "adapter_model.safetensors"])
def test_an_adapter_beside_a_config_is_one_too(photos, model, tmp_path, caplog, named):
    adapter = tmp_path / "checkpoint-400"
    adapter.mkdir()
    shutil.copy(model / "config.json", adapter)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    shutil.copy(model / "model.safetensors", adapter / "adapter_model.safetensors")
    assert captions.caption(adapter / named, photos) == 2
    assert "merge_and_unload" in caplog.messages[-1]


def test_a_whole_model_beside_an_adapter_is_a_model(photos, model, tmp_path):
    whole = shutil.copytree(model, tmp_path / "whole")
    (whole / "adapter_config.json").write_text("{}")
    assert captions.caption(whole, photos, dry_run=True) == 0


def test_an_adapter_says_how_to_merge_it(photos, tmp_path, caplog):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert captions.caption(adapter, photos) == 2
    assert "merge_and_unload" in caplog.messages[-1]
    assert "with Qwen/Qwen2.5-VL-3B-Instruct as the base" in caplog.messages[-1]
