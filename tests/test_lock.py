"""One process at a time, with the system's locks and without them."""

import os
import subprocess
import sys

import captions
import pytest
from forked import exit_code, fork

from torchtune_qwen25vl import _lock

HIDDEN = """
import multiprocessing, sys
sys.modules["fcntl"] = None
multiprocessing.get_context = lambda *_, make=multiprocessing.get_context: make("spawn")
from torchtune_qwen25vl._cli import caption
from torchtune_qwen25vl import _lock
from torchtune_qwen25vl.jobs import _workers
assert not _lock.HAS_FCNTL
assert _workers._CONTEXT.get_start_method() == "spawn"
if __name__ == "__main__":
    sys.exit(caption())
"""


@pytest.fixture(params=[True, False], ids=["fcntl", "no fcntl"])
def lock(request, monkeypatch, tmp_path):
    monkeypatch.setattr(_lock, "HAS_FCNTL", request.param)
    return tmp_path / "lock"


def holds(path):
    with _lock.locked(path) as is_ours:
        return is_ours


def in_child(body):
    return exit_code(fork(body))


def test_two_processes_do_not_hold_it_at_once(lock):
    with _lock.locked(lock) as is_ours:
        assert is_ours
        assert in_child(lambda: int(holds(lock))) == 0
    assert in_child(lambda: int(holds(lock))) == 1  # the control


@pytest.mark.parametrize("content", ["", "no number", "1 0.5", "999999999 1.0"])
def test_what_a_dead_one_left_holds_nobody_up(lock, content):
    lock.write_text(content)
    assert holds(lock)
    assert holds(lock)


def test_one_that_is_killed_lets_go(lock):
    def die():
        with _lock.locked(lock):
            os._exit(3)

    assert in_child(die) == 3
    assert holds(lock)


def test_captions_without_fcntl_and_fork(tmp_path):
    model = captions.write_model(tmp_path / "model")
    photos = captions.write_pictures(tmp_path / "set [a]", 2)
    script = tmp_path / "script.py"
    script.write_text(HIDDEN)
    words = ["set [a]", f"model={model}", "workers=1", "device=cpu", "max_new_tokens=4"]
    command = [sys.executable, str(script), *words, "min_pixels=3136", "max_pixels=25088"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(captions.texts(photos)) == 2
    assert not (photos / "_captions" / "lock").exists()
