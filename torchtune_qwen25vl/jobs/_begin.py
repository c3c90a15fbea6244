"""The beginning of a job: its folder is its own, and what was done there before is known."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from torchtune_qwen25vl.jobs._journal import Past, Recorded, Run, claimed, take_up
from torchtune_qwen25vl.jobs._settings import JobSettings

R = TypeVar("R", bound=Recorded)


def _as_it_is(record: R) -> R:
    return record


def begin(
    settings: JobSettings,
    record: type[R],
    run: Run,
    stack: ExitStack,
    *,
    complete: Callable[[R], R] = _as_it_is,
) -> tuple[Run, Past[R]]:
    """Claim a job's folder, unless it is a dry run, and find out what was done there before.

    Args:
        settings: settings of the recipe
        record: class of the job's records
        run: what the results depend on now
        stack: keeps the folder claimed
        complete: see `take_up`

    Returns:
        the run as it was begun, and what is known of it

    Raises:
        ValueError: if another run is at work in the folder, or what is in it cannot be read.
    """
    if not settings.dry_run:
        stack.enter_context(claimed(settings.folder))
    past = take_up(
        settings.folder,
        record,
        run,
        complete=complete,
        restart=settings.restart,
        dry_run=settings.dry_run,
    )
    assert past.run is not None
    return past.run, past
