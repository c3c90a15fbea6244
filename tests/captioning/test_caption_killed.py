"""A run that is killed and started again leaves what a run in one piece leaves, byte for byte."""

import os
import random
import shutil
import signal
import threading
import time

import captions
import pytest
from forked import exit_code, fork

from torchtune_qwen25vl import _files
from torchtune_qwen25vl.jobs import _journal

KEYS = {"outputs": ["txt", "jsonl", "csv"], "existing": "append", "batch_size": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Photos, two of which have captions, to which a run appends; one is damaged."""
    folder = captions.write_pictures(tmp_path_factory.mktemp("pictures") / "photos", 9)
    (folder / "bad.png").write_bytes(b"no picture")
    for index in (1, 4):
        (folder / f"picture 00{index}.txt").write_text(f"Mine {index}.\n")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The place where all runs happen: paths are part of what is written."""
    return tmp_path_factory.mktemp("work") / "photos"


@pytest.fixture(scope="module")
def whole(model, original, work):
    """Files of a run in one piece, and its seconds."""
    shutil.copytree(original, work)
    start = time.perf_counter()
    assert captions.caption(model, work, **KEYS) == 1
    seconds = time.perf_counter() - start
    files = captions.final_files(work)
    assert files["picture 001.txt"].startswith(b"Mine 1. ")
    shutil.rmtree(work)
    return files, seconds


def killed(child, seconds=60.0):
    """Whether a process ended by a signal: ours after so many seconds, or one before it."""
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
    timer.start()
    code = exit_code(child)
    timer.cancel()
    return code < 0


def finish(model, work, files, **changes):
    assert captions.caption(model, work, **{**KEYS, **changes}) == 1
    assert captions.final_files(work) == files
    shutil.rmtree(work)


def random_moments(count, whole, seed):
    """Moments of a run, a little beyond its end."""
    generator = random.Random(seed)
    return [generator.uniform(0, 1.1 * whole[1]) for _ in range(count)]


def check_killing(model, original, work, whole, moments, **changes):
    times_killed = 0
    for seconds in moments:
        shutil.copytree(original, work)
        child = fork(lambda: captions.caption(model, work, **{**KEYS, **changes}))
        times_killed += killed(child, seconds)
        finish(model, work, whole[0])
    return times_killed


def test_killed_at_random_moments(model, original, work, whole):
    assert check_killing(model, original, work, whole, random_moments(5, whole, 0)) > 0


@pytest.mark.slow
def test_killed_at_50_random_moments(model, original, work, whole):
    assert check_killing(model, original, work, whole, random_moments(50, whole, 1)) > 25


def test_killed_with_worker_processes(model, original, work, whole):
    moments = [0.6 * whole[1]]
    assert check_killing(model, original, work, whole, moments, workers=2) == 1


def dying(step, monkeypatch):
    """Die at the so-maniest moment at which something reaches the disk, a line half written."""
    moments = iter(range(1000))

    def before(function, half):
        def run(*arguments, **keys):
            if next(moments) == step:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keys)

        return run

    def half_a_line(journal, entry):
        line = _journal._line(entry)
        journal._file.write(line[: len(line) // 2])
        journal._file.flush()

    add = _journal.Journal._add
    monkeypatch.setattr(_journal.Journal, "_add", before(add, half_a_line))
    for module, name in ((_files.os, "replace"), (_files.os, "fsync")):
        monkeypatch.setattr(module, name, before(getattr(module, name), lambda *_: None))


def check_every_moment(model, original, work, whole, steps, monkeypatch):
    deaths = 0
    for step in steps:
        shutil.copytree(original, work)

        def body(step=step):
            dying(step, monkeypatch)
            return captions.caption(model, work, **KEYS)

        died = killed(fork(body))
        deaths += died
        finish(model, work, whole[0])
    return deaths


def test_killed_where_it_hurts(model, original, work, whole, monkeypatch):
    steps = (0, 5, 8, 14)
    assert check_every_moment(model, original, work, whole, steps, monkeypatch) == len(steps)


@pytest.mark.slow
def test_killed_at_every_write(model, original, work, whole, monkeypatch):
    """Writes, renames and flushes, until a run dies no more."""
    for step in range(1000):
        if not check_every_moment(model, original, work, whole, [step], monkeypatch):
            break
    assert step > 40


def test_killed_again_and_again(model, original, work, whole, monkeypatch):
    """Every attempt dies a little later; none begins from nothing."""
    shutil.copytree(original, work)
    for step in (7, 9, 12, 18):

        def body(step=step):
            dying(step, monkeypatch)
            return captions.caption(model, work, **KEYS)

        assert killed(fork(body))
    finish(model, work, whole[0])


def test_what_a_user_edits_stays(model, original, work, whole):
    """Resuming writes only those text files that may not have been written."""
    shutil.copytree(original, work)
    captions.caption(model, work, **KEYS)
    (work / "picture 001.txt").write_text("Edited.\n")
    captions.caption(model, work, **KEYS)
    assert (work / "picture 001.txt").read_text() == "Edited.\n"
    shutil.rmtree(work)


def test_the_comparison_sees_an_appended_caption(model, original, work, whole):
    """The control: forget the journal, and captions are appended twice."""
    shutil.copytree(original, work)
    captions.caption(model, work, **KEYS)
    (work / "_captions" / "journal-0.jsonl").unlink()
    captions.caption(model, work, **KEYS)
    assert captions.final_files(work)["picture 001.txt"] != whole[0]["picture 001.txt"]
    shutil.rmtree(work)
