"""Examines stages in two processes, which is how the tests run too."""

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from parity.runner import Outcome, Sighting, examine
from parity.stages import Setting, Stage

PROCESSES = 2

_given: list[tuple[Stage, Setting]] = []  # of a forked process


def examined(stages: Sequence[Stage], setting: Setting) -> Iterator[tuple[Outcome, list[Sighting]]]:
    """Run stages and their faults, in their order.

    Random weights on the CPU are examined by two processes, forked where Linux does. A checkpoint
    would be held by each of them, and a device cannot be forked.
    """
    if setting.checkpoint or setting.device != "cpu" or sys.platform != "linux":
        yield from (examine(stage, setting) for stage in stages)
        return
    fork = multiprocessing.get_context("fork")
    given = [(stage, setting) for stage in stages]
    with ProcessPoolExecutor(PROCESSES, fork, _given.extend, (given,)) as pool:
        for stage, (found, seen) in zip(stages, pool.map(_found, range(len(stages))), strict=True):
            yield Outcome(stage, **found), seen


def _found(index: int) -> tuple[dict[str, Any], list[Sighting]]:
    """What is found out about a stage; the stage itself stays here, since it is a function."""
    outcome, seen = examine(*_given[index])
    return {name: value for name, value in vars(outcome).items() if name != "stage"}, seen
