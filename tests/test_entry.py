"""The first lines of the commands: Ctrl-C while Python still imports, and while a command runs."""

import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import tune_qwen25vl

ROOT = Path(__file__).parents[1]
LINE = "\nstopped, start again to go on\n"
BEGIN = "import sys, tune_qwen25vl; print('begun', flush=True); sys.exit(tune_qwen25vl.{}())"


@pytest.mark.parametrize(
    ("command", "delay"),  # seconds; the imports take several
    [
        ("caption", 0.0),
        ("caption", 0.6),
        ("tune", 0.3),
        ("hidden_states", 0.1),
        ("embed_prompts", 0.4),
    ],
)
def test_ctrl_c_during_the_imports_is_one_line(command, delay):
    program = [sys.executable, "-c", BEGIN.format(command), "--help"]
    with subprocess.Popen(
        program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(delay + 0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, LINE)


def test_ctrl_c_while_a_command_runs_is_one_line(monkeypatch, capfd):
    class Commands:
        @staticmethod
        def caption():
            raise KeyboardInterrupt

    monkeypatch.setattr(tune_qwen25vl, "import_module", lambda _: Commands)
    before = signal.getsignal(signal.SIGINT)
    assert tune_qwen25vl.caption() == 130
    assert capfd.readouterr().err == LINE
    assert signal.getsignal(signal.SIGINT) is before


def test_every_command_begins_there_but_the_harness():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    begun = {name for name, place in scripts.items() if place.startswith("tune_qwen25vl:")}
    assert begun == set(scripts) - {"parity"}
