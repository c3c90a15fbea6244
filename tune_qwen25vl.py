"""The first lines of every command: from here on Ctrl-C ends it in one line.

The package imports torch, which takes seconds; so the commands begin in a module outside of it that
imports nothing.
"""

import os
import signal
import sys
from importlib import import_module
from typing import Any

STOPPED = 130  # exit code of Ctrl-C
LINE = b"\nstopped, start again to go on\n"


def tune() -> int:
    """Run `tune-qwen25vl`."""
    return _run("main")


def caption() -> int:
    """Run `caption`."""
    return _run("caption")


def hidden_states() -> int:
    """Run `hidden-states`."""
    return _run("hidden_states")


def embed_prompts() -> int:
    """Run `embed-prompts`."""
    return _run("embed_prompts")


def _run(name: str) -> int:
    """Import the commands, during which nothing can be interrupted half-way, and run one."""
    before = signal.signal(signal.SIGINT, _stop)
    commands = import_module("torchtune_qwen25vl._cli")
    signal.signal(signal.SIGINT, before)
    try:
        return getattr(commands, name)()
    except KeyboardInterrupt:
        os.write(sys.stderr.fileno(), LINE)
        return STOPPED


def _stop(*_: Any) -> None:
    os.write(sys.stderr.fileno(), LINE)
    os._exit(STOPPED)
