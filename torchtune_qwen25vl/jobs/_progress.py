"""What a job tells while it goes on and when it is over."""

import errno
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from tqdm import tqdm

from torchtune_qwen25vl.jobs._journal import Recorded

logger = logging.getLogger(__name__)
NAMED = 20  # failed items, at most, at the end of a run
FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system says of a disk, and of a user's share of it


def problem_of(error: Exception) -> str:
    """Say in one line why a job cannot go on."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full ({error}): make room and start again to go on"
    return str(error)


class Progress:
    """A bar with items a second, the time that is left, and the number of items in each state.

    Args:
        total: number of items of this rank
        states: names of the states, in the order in which they are told
        unit: what an item is called
        show: whether there is a bar at all
    """

    def __init__(self, total: int, states: Sequence[str], *, unit: str, show: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._states, self._unit = states, unit
        self._start = time.perf_counter()
        self._bar = tqdm(total=total, unit=unit, disable=not show, file=sys.stderr, smoothing=0.1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def add(self, records: Iterable[Recorded]) -> None:
        """Count items that have ended."""
        new = Counter(record.state for record in records)
        self.counts += new
        self._bar.set_postfix_str(summary(self.counts, self._states), refresh=False)
        self._bar.update(new.total())

    def speed(self, waited: float) -> str:
        """Say the items a second, and the share of the time in which the model had nothing to do.

        Args:
            waited: seconds in which it had nothing to do
        """
        share = waited / self.seconds
        rate = self.counts.total() / self.seconds
        return f"{rate:.2f} {self._unit}s a second; the model waited {share:.1%} of the time"

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._start


def name_failed(reasons: Sequence[str], elsewhere: str) -> None:
    """Name what failed in the log, at most `NAMED` of it.

    Args:
        reasons: of each, with its name
        elsewhere: what names the others, as "FILE names"
    """
    for reason in reasons[:NAMED]:
        logger.error("failed: %s", reason)
    if len(reasons) > NAMED:
        logger.error("and %d more, which %s", len(reasons) - NAMED, elsewhere)


def summary(counts: Counter[str], states: Sequence[str]) -> str:
    """Say how many there are in each state, in this order; states without any are left out."""
    return ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
