"""What is forked says why it ended, else a test that waits for it would not."""

import logging
import signal
import time

import forked
import on_ranks
import pytest


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


def test_ranks_that_fail_fail_the_test():
    with pytest.raises(AssertionError, match="as it should"):
        on_ranks.succeed(2, fails)


def test_a_command_says_what_it_logs(tmp_path):
    def command(words):
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.info("%s", words)
        return 3

    assert forked.run_command(command, ["a", "b"], tmp_path / "said") == (3, "['a', 'b']\n")
