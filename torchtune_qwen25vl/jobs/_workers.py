"""Processes that read images, one at a time each, and may die of it.

A decoder that crashes, hangs or eats all memory takes its process with it, not the run. The image
that it was reading is known and fails, and a new process takes the place of the dead one. No pool
of the standard library or of torch tells which task a dead process was at.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

# a forked process is at work at once; it never touches a device
_CONTEXT: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
ORPHAN_SECONDS = 1.0  # after which a process looks whether its parent is alive


def count_cores() -> int:
    """Count the cores that this process may use; all of them where the system does not say."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Task(NamedTuple):
    """A function and its arguments, all of them picklable."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Outcome(NamedTuple):
    """The value that a task returned, or the reason why there is none."""

    value: Any = None
    problem: str = ""


def attempt(task: Task) -> Outcome:
    """Do a task in this process; any exception becomes the outcome's problem."""
    try:
        return Outcome(task.function(*task.arguments))
    except Exception as error:  # decoders raise a dozen kinds of it on damaged files
        return Outcome(problem=str(error) or type(error).__name__)


class Workers:
    """Processes that do tasks; without any, tasks are done where their outcomes are asked for.

    Args:
        count: number of processes
        seconds: time limit of a task, after which its process is killed
    """

    def __init__(self, count: int, *, seconds: float = 120.0) -> None:
        self._count, self._seconds = count, seconds
        self._idle = [_Worker() for _ in range(count)]
        self._busy: dict[_Worker, tuple[int, float]] = {}  # number of the task, deadline

    def map(self, tasks: Iterable[Task], *, ahead: int) -> Iterator[Outcome]:
        """Do tasks; yield their outcomes in the order of the tasks.

        Args:
            tasks: are taken one by one
            ahead: most tasks that are begun or done and whose outcome is not yet asked for
        """
        if self._count == 0:
            yield from map(attempt, tasks)
            return
        numbered, outcomes, asked = enumerate(tasks), dict[int, Outcome](), 0
        ahead = max(ahead, self._count)
        try:
            while True:
                places = min(len(self._idle), ahead - len(outcomes) - len(self._busy))
                for number, task in islice(numbered, places):
                    self._start(number, task)
                if not self._busy:
                    return
                outcomes |= self._collect()
                while asked in outcomes:
                    yield outcomes.pop(asked)
                    asked += 1
        finally:  # outcomes that nobody waits for must not be taken for those of later tasks
            for worker in list(self._busy):
                self._replace(worker)

    def close(self) -> None:
        """End the processes."""
        for worker in [*self._idle, *self._busy]:
            worker.kill()
        self._idle, self._busy = [], {}

    def _start(self, number: int, task: Task) -> None:
        worker = self._idle.pop()
        self._busy[worker] = number, time.monotonic() + self._seconds
        worker.send(task)

    def _collect(self) -> dict[int, Outcome]:
        """Wait until a task ends or its time does; return the outcomes by number."""
        first = min(deadline for _, deadline in self._busy.values())
        ready = wait(
            [worker.connection for worker in self._busy], max(0.0, first - time.monotonic())
        )
        ended = {}
        for worker, (number, deadline) in list(self._busy.items()):
            if worker.connection in ready:
                ended[number] = self._receive(worker)
            elif time.monotonic() > deadline:
                ended[number] = Outcome(problem=f"not read within {self._seconds:g} seconds")
                self._replace(worker)
        return ended

    def _receive(self, worker: "_Worker") -> Outcome:
        try:
            outcome = worker.connection.recv()
        except (EOFError, OSError):
            return Outcome(problem=f"its decoder crashed ({self._replace(worker)})")
        del self._busy[worker]
        self._idle.append(worker)
        return outcome

    def _replace(self, worker: "_Worker") -> str:
        """Kill a busy process and start another; say how the killed one ended."""
        del self._busy[worker]
        self._idle.append(_Worker())
        return worker.kill()


class _Worker:
    """A process, and our end of the pipe to it."""

    def __init__(self) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, task: Task) -> None:
        """Begin a task; if the process is gone, that shows when its outcome is read."""
        with contextlib.suppress(ConnectionError):
            self.connection.send(task)

    def kill(self) -> str:
        """Kill the process, unless it has ended; say how it ended."""
        self._process.kill()
        self._process.join()
        self.connection.close()
        code = self._process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    torch.set_num_threads(1)
    while True:
        while not connection.poll(ORPHAN_SECONDS):
            if os.getppid() != parent:
                return
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(attempt(task))
