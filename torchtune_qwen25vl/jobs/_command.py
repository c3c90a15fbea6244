"""A recipe as a command: words to a config, a job to an exit code, errors to one line.

Exit codes are 0 for all well, 1 where some items failed, 2 where the job could not start or go on,
130 where Ctrl-C stopped it.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from torchtune_qwen25vl.jobs._progress import problem_of
from torchtune_qwen25vl.jobs._settings import JobSettings
from torchtune_qwen25vl.jobs._words import read_words

logger = logging.getLogger(__name__)
STOPPED = 130  # exit code of Ctrl-C


def run_command(
    words: Sequence[str] | None,
    run: Callable[[DictConfig], int],
    settings: type[JobSettings],
    *,
    usage: str,
    config: Path,
) -> int:
    """Run a recipe on the words of a command line; return its exit code.

    Without words, or with --help among them, the usage and all keys are printed instead.

    Args:
        words: those behind the command; None for those of this process
        run: runs the recipe on a config
        settings: class of the recipe's keys
        usage: text of the help
        config: YAML of the keys and their defaults, printed behind the usage
    """
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help"} & set(words):
        keys = "These are the keys, with the values they have by default:"
        print(f"{usage.strip()}\n\n{keys}\n\n{config.read_text('utf-8')}")
        return 0 if words else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        cfg = read_words(words, config, settings)
    except (ValueError, OmegaConfBaseException) as error:
        logger.error("%s", error)
        return 2
    return run(cfg)


def run_job(job: Callable[[ExitStack], int]) -> int:
    """Run a job to its exit code; what it put on the stack is closed, however it ends."""
    with _stopping(), logging_redirect_tqdm():
        try:
            with ExitStack() as stack:
                return job(stack)
        except (ValueError, OSError, OmegaConfBaseException) as error:
            logger.error("%s", problem_of(error))
        except Exception:  # Python's own exit code, 1, would say that items failed
            logger.exception("the run cannot go on; what is done stays done")
        return 2


@contextmanager
def _stopping() -> Iterator[None]:
    """End this process and its workers at once on Ctrl-C, in one line.

    Nothing is closed on the way: what is on disk is whole at any moment, and a thread that reads
    ahead may be waiting for an image.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # where no signal arrives
        return
    process = os.getpid()

    def stop(*_: Any) -> None:
        for child in multiprocessing.active_children() if os.getpid() == process else ():
            child.kill()
        if os.getpid() == process and os.environ.get("RANK", "0") == "0":
            sys.stdout.flush()
            os.write(2, b"\nstopped, start again to go on\n")
        os._exit(STOPPED)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
