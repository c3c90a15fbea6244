"""Processes forked from a test. None of them outlives its test by more than `SECONDS`.

A fork has everything imported already, which a process of its own needs seconds for.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback

from tqdm import tqdm

SECONDS = 300  # until a forked process that waits for nothing that comes is ended


def fork(body, said=os.devnull):
    """Run in a forked process, in silence, what returns an exit code; the process's id.

    Args:
        body: what is run
        said: file for what it writes to stderr, with where it failed or hung
    """
    if (child := os.fork()) == 0:
        code = 70
        try:
            logging.disable()
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            sys.stderr = sys.__stderr__  # and not what pytest keeps of it
            tqdm.set_lock(threading.RLock())  # forks share tqdm's, and a killed one keeps it
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(SECONDS)
            code = body()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def run_command(command, words, said):
    """Run a command of ours in a forked process, where it logs to stderr as in one of its own.

    Args:
        command: takes words and returns an exit code
        words: those behind the command
        said: file for what it writes to stderr

    Returns:
        the exit code, and what was written
    """

    def body():
        logging.disable(logging.NOTSET)
        logging.root.handlers.clear()
        return command(words)

    return exit_code(fork(body, said)), said.read_text()


def exit_code(child):
    """Wait for a process; its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
