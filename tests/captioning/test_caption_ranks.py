"""Two processes on one folder leave what one process leaves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import captions
import pytest
from on_ranks import on_ranks

from torchtune_qwen25vl.captioning import _run

ROOT = Path(__file__).parents[2]
KEYS = {"outputs": ["txt", "jsonl", "csv"], "batch_size": 2}


@pytest.fixture
def photos(tmp_path):
    folder = captions.write_pictures(tmp_path / "photos", 7)
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def one_process(model, photos, original):
    """Files of one process, and the folder as it was before."""
    shutil.copytree(photos, original)
    assert captions.caption(model, photos, **KEYS) == 1
    files = captions.final_files(photos)
    shutil.rmtree(photos)
    shutil.copytree(original, photos)
    return files


def journals(photos):
    return sorted(path.name for path in (photos / "_captions").glob("journal-*"))


def test_two_ranks_leave_what_one_leaves(model, photos, tmp_path):
    files = one_process(model, photos, tmp_path / "original")
    assert on_ranks(2, lambda: captions.caption(model, photos, **KEYS)) == [1, 1]
    assert journals(photos) == ["journal-0.jsonl", "journal-1.jsonl"]
    assert all("batch" in (photos / "_captions" / name).read_text() for name in journals(photos))
    (photos / "_captions" / "journal-1.jsonl").rename(tmp_path / "journal-1.jsonl")
    assert captions.final_files(photos) == files
    (tmp_path / "journal-1.jsonl").rename(photos / "_captions" / "journal-1.jsonl")
    assert captions.caption(model, photos, **KEYS) == 1  # alone again: nothing is left to do
    assert journals(photos) == ["journal-0.jsonl"]
    assert captions.final_files(photos) == files


def test_what_the_first_rank_refuses_all_refuse(model, photos):
    empty = photos / "empty"
    empty.mkdir()
    assert on_ranks(2, lambda: captions.caption(model, empty, **KEYS)) == [2, 2]


def test_one_rank_goes_on_where_two_were_killed(model, photos, tmp_path):
    files = one_process(model, photos, tmp_path / "original")

    def dies_in_the_middle():
        record = _run._record
        left = iter([True])

        def dying(answer, settings):
            return record(answer, settings) if next(left, False) else os.kill(os.getpid(), 9)

        _run._record = dying
        return captions.caption(model, photos, **KEYS)

    assert on_ranks(2, dies_in_the_middle) == [-9, -9]
    assert captions.caption(model, photos, **KEYS) == 1
    assert captions.final_files(photos) == files


@pytest.mark.slow
def test_under_torchrun(model, photos, tmp_path):
    files = one_process(model, photos, tmp_path / "original")
    keys = {**captions.SMALL, **KEYS, "model": model, "inputs": photos}
    words = [f"{key}={value}" for key, value in keys.items() if not isinstance(value, list)]
    words += ["outputs=[txt,jsonl,csv]", "write_states=[done,cut,looped]"]
    launch = ["-m", "torchtune_qwen25vl._cli", "run", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, "caption", "--config", "caption", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # one image is bad
    (photos / "_captions" / "journal-1.jsonl").unlink()
    assert captions.final_files(photos) == files
