"""A recipe as a command: words to a config, a job to an exit code, errors to one line.

Exit codes are 0 for all well, 1 where some items failed, 2 where the job could not start or go on.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from torchtune_qwen25vl.jobs._settings import JobSettings
from torchtune_qwen25vl.jobs._words import read_words

logger = logging.getLogger(__name__)


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
    with logging_redirect_tqdm(), ExitStack() as stack:
        try:
            return job(stack)
        except (ValueError, OSError) as error:
            logger.error("%s", error)
        except Exception:  # Python's own exit code, 1, would say that items failed
            logger.exception("the run cannot go on; what is done stays done")
        return 2
