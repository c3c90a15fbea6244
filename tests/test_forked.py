"""What is forked says why it ended, else a test that waits for it would not."""

import logging
import multiprocessing
import os
import signal
import time

import forked
import on_ranks
import pytest
from tqdm import tqdm


def bare(body):
    """Fork as Python does."""
    if (child := os.fork()) == 0:
        body()
    return child


def fails():
    raise ArithmeticError("as it should")


def test_what_fails_says_where(tmp_path):
    assert forked.exit_code(forked.fork(fails, tmp_path / "said")) == 70
    assert "in fails" in (tmp_path / "said").read_text()


def test_what_hangs_is_ended_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(forked, "SECONDS", 1)
    child = forked.fork(lambda: time.sleep(60), tmp_path / "said")
    assert forked.exit_code(child) == -signal.SIGALRM
    assert "test_forked.py" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("fork", [forked.fork, bare])
def test_what_is_killed_keeps_no_lock_of_the_bars(fork):
    def dies():
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    def waits():
        shared = multiprocessing.get_context("fork").RLock()  # as tqdm's own, but not the tests'
        tqdm.set_lock(shared)
        assert forked.exit_code(fork(dies)) == -signal.SIGKILL
        return 0 if shared.acquire(timeout=1) else 1

    assert forked.exit_code(forked.fork(waits)) == (fork is bare)


def test_ranks_that_fail_fail_the_test():
    with pytest.raises(AssertionError, match="as it should"):
        on_ranks.succeed(2, fails)


def test_a_command_says_what_it_logs(tmp_path):
    def command(words):
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.info("%s", words)
        return 3

    assert forked.run_command(command, ["a", "b"], tmp_path / "said") == (3, "['a', 'b']\n")
