"""Processes forked from a test. None of them outlives its test by more than `SECONDS`."""

import logging
import os
import signal

SECONDS = 300  # until a forked process that waits for nothing that comes is ended


def fork(body):
    """Run in a forked process, in silence, what returns an exit code; the process's id."""
    if (child := os.fork()) == 0:
        code = 70
        try:
            signal.alarm(SECONDS)
            logging.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            code = body()
        finally:
            os._exit(code)
    return child


def exit_code(child):
    """Wait for a process; its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
