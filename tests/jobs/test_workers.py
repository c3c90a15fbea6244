"""Worker processes: order, crashes, deadlines, and what is done ahead."""

import os
import signal
import struct
import sys
import threading
import time

import pytest
from forked import exit_code, fork

from torchtune_qwen25vl.jobs import Ahead, Outcome, Task, Workers, attempt


def double(number):
    return 2 * number


def crash(_):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(_):
    os._exit(3)


def leave_in_the_middle_of_the_answer(_):
    frame = sys._getframe()
    while "connection" not in frame.f_locals:
        frame = frame.f_back
    os.write(frame.f_locals["connection"].fileno(), struct.pack("!i", 100) + b"the first half")
    os._exit(4)


def hang(_):
    threading.Event().wait()


def refuse(number):
    raise ValueError(f"{number} is refused")


def process(_):
    return os.getpid()


@pytest.fixture
def workers():
    made = Workers(2, seconds=20.0)
    yield made
    made.close()


def tasks(*functions):
    return [Task(function, (number,)) for number, function in enumerate(functions)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_outcomes_come_in_order(count):
    made = Workers(count)
    outcomes = list(made.map(tasks(double, refuse, *[double] * 20), ahead=4))
    made.close()
    assert outcomes == [
        Outcome(0),
        Outcome(problem="1 is refused"),
        *(Outcome(2 * number) for number in range(2, 22)),
    ]


def test_who_crashes_is_named_and_the_others_go_on(workers):
    outcomes = list(workers.map(tasks(double, crash, double, leave, double, double), ahead=3))
    assert [outcome.value for outcome in outcomes] == [0, None, 4, None, 8, 10]
    assert outcomes[1].problem == "its decoder crashed (SIGKILL)"
    assert outcomes[3].problem == "its decoder crashed (exit code 3)"


def test_half_an_answer_is_none(workers):
    broken = leave_in_the_middle_of_the_answer
    outcomes = list(workers.map(tasks(double, broken, double), ahead=3))
    assert [outcome.value for outcome in outcomes] == [0, None, 4]
    assert outcomes[1].problem in (
        f"its decoder crashed ({how})" for how in ("exit code 4", "SIGKILL")
    )


def test_who_hangs_is_given_up():
    made = Workers(2, seconds=0.5)
    outcomes = list(made.map(tasks(double, hang, double, double), ahead=2))
    made.close()
    assert [outcome.value for outcome in outcomes] == [0, None, 4, 6]
    assert outcomes[1].problem == "not read within 0.5 seconds"


def test_tasks_are_taken_no_further_than_ahead(workers):
    taken = []
    source = (taken.append(number) or Task(double, (number,)) for number in range(50))
    outcomes = workers.map(source, ahead=5)
    next(outcomes)
    assert len(taken) <= 6


def test_what_is_not_waited_for_is_not_mistaken_for_something_else(workers):
    outcomes = workers.map(tasks(*[double] * 9), ahead=4)
    next(outcomes)
    outcomes.close()
    assert [o.value for o in workers.map([Task(double, (50,))], ahead=1)] == [100]


def test_processes_are_reused_and_end_with_their_parent(workers):
    found = {outcome.value for outcome in workers.map(tasks(*[process] * 9), ahead=2)}
    assert len(found) <= 2
    reading, writing = os.pipe()

    def dies():
        os.close(reading)
        theirs = Workers(1)
        pid = next(theirs.map([Task(process, (0,))], ahead=1)).value
        os.write(writing, f"{pid}".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    child = fork(dies)
    os.close(writing)
    orphan = os.read(reading, 20)
    assert exit_code(child) == -signal.SIGKILL
    assert orphan
    assert os.read(reading, 1) == b""  # its end of the pipe is closed: the orphan is gone


def test_any_exception_becomes_a_problem():
    assert attempt(Task(double, (1, 2))).problem
    assert attempt(Task(refuse, (3,))) == Outcome(problem="3 is refused")


def test_ahead_gives_what_it_is_given_and_where_it_failed():
    def values():
        yield from range(5)
        raise ValueError("the sixth")

    found = iter(Ahead(values()))
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="the sixth"):
        next(found)


def test_ahead_keeps_some_ready_and_no_more():
    taken, full = [], threading.Event()

    def values():
        for number in range(100):
            taken.append(number)
            if number == 3:
                full.set()
            yield number

    ahead = Ahead(values(), depth=2)
    next(iter(ahead))
    assert full.wait(20)
    ahead.close()
    assert len(taken) <= 5


def test_ahead_measures_how_long_it_is_waited_for():
    release = threading.Event()

    def values():
        release.wait(20)
        yield 1

    threading.Timer(0.2, release.set).start()
    start = time.perf_counter()
    ahead = Ahead(values())
    assert list(ahead) == [1]
    assert 0.1 < ahead.waited <= time.perf_counter() - start
