"""How a run ends before its last step: a signal to stop, or an error that is told in one line."""

import multiprocessing
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torchtune.config._errors import InstantiationError

from torchtune_qwen25vl import _ranks

OF_USERS = (ValueError, OSError, InstantiationError)  # errors that a user can mend
IN_A_WORKER = "Caught "  # how torch begins an error of a dataloader's worker, its traceback inside


class Stopped(Exception):
    """A run was asked to stop, and has written its checkpoint."""

    def __init__(self, step: int, total_steps: int) -> None:
        super().__init__(
            f"stopped by SIGTERM after step {step} of {total_steps}, with a checkpoint; the same "
            "command goes on from it"
        )


class StopRequest:
    """Notes SIGTERM while it is entered, so that the step that is under way ends first."""

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> "StopRequest":
        self._before: Any = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def came(self, device: torch.device) -> bool:
        """Say whether any rank was asked to stop; every rank asks after every step."""
        return _ranks.largest(int(self._noted), device) > 0


def leave_signals_to_the_run(worker: int) -> None:
    """Let a dataloader's worker outlive the signals that its whole group of processes gets.

    The run ends its workers itself, after it has written what it has to write.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def in_one_line(recipe: Callable[[], Any]) -> int:
    """Call a recipe; return the exit code, and say in one line why it could not go on.

    Args:
        recipe: function without arguments

    Returns:
        0 if all is well, 2 if the recipe refused or could not go on, 130 and 143 if it was
        stopped by Ctrl-C and SIGTERM
    """
    try:
        return int(recipe() or 0)
    except Stopped as stopped:
        return _say(f"{stopped}", 143)
    except KeyboardInterrupt:
        return _say("stopped; the same command goes on from the last checkpoint", 130)
    except OF_USERS as error:
        return _say(_line(error), 2)
    except TypeError as error:
        if (words := _into_lists(error)) is None:
            raise
        return _say(words, 2)
    finally:
        _end_workers()


def _into_lists(error: TypeError) -> str | None:
    """Say which words of the command line reach into a list of the YAML, if that is the error."""
    if "Cannot merge" not in str(error):  # OmegaConf's, which names neither
        return None
    words = [word for word in sys.argv if re.match(r"[\w.]+\.\d+[.=]", word)]
    return (
        f"a list of the YAML is given whole on the command line, as in rewards=[...], got "
        f"{' '.join(words)}; write it whole, or change it in a copy of the config"
    )


def _end_workers() -> None:
    """End the dataloaders' workers that an error has left, which no signal but one would end.

    Python waits for them when it exits. torch would raise for each of them that is killed.
    """
    left = multiprocessing.active_children()
    if not left:
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in left:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, before)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [repr(error)]
    if lines[0].startswith(IN_A_WORKER):
        return lines[-1].partition(": ")[2]
    return " ".join(line.strip() for line in lines)


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code
