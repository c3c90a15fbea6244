"""What a run tells while it goes on and when it is over."""

import sys
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from tqdm import tqdm

from torchtune_qwen25vl.jobs._journal import Record


class Progress:
    """A bar with images a second, the time that is left, and failures.

    Args:
        total: images of this rank
        show: whether there is a bar at all
    """

    def __init__(self, total: int, *, show: bool) -> None:
        self.counts: Counter[str] = Counter()
        self._start = time.perf_counter()
        self._bar = tqdm(
            total=total, unit="image", disable=not show, file=sys.stderr, smoothing=0.1
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def add(self, records: Iterable[Record]) -> None:
        """Count images that have ended."""
        new = Counter(record.state for record in records)
        self.counts += new
        self._bar.set_postfix_str(summary(self.counts), refresh=False)
        self._bar.update(new.total())

    def speed(self, waited: float) -> str:
        """Images a second, and the share of the time in which the model had nothing to do."""
        share = waited / self.seconds
        rate = self.counts.total() / self.seconds
        return f"{rate:.2f} images a second; the model waited {share:.1%} of the time"

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self._start


def summary(counts: Counter[str]) -> str:
    """Numbers of images by state, those there are."""
    states = ("done", "skipped", "failed", "cut", "looped")
    return ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
