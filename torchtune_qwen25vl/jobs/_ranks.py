"""Several processes on one list of items, started by torchrun; or one alone."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.jobs._progress import problem_of

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # how long a rank may wait for the others: as long as a job takes


class Ranks:
    """This process among its equals.

    Ranks exchange plans and wait for each other; no tensor passes between them.

    Attributes:
        size: number of ranks
        rank: of this process
        local_size: number of ranks on this machine
    """

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that plans and merges."""
        return self.rank == 0

    def share(self, things: list[T]) -> list[T]:
        """Return every so-many-eth thing: those that are this rank's to do."""
        return things[self.rank :: self.size]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on all ranks what the first one makes; the others wait for it.

        Raises:
            ValueError: on all ranks, if the first one cannot make it.
        """
        values: list[Any] = [None, None]
        if self.is_first:
            try:
                values = [make(), None]
            except (ValueError, OSError) as error:
                values = [None, problem_of(error)]
        made, problem = _ranks.from_first(values)
        if problem is not None:
            raise ValueError(problem)
        return made

    def wait(self) -> None:
        """Wait until all ranks are here."""
        _ranks.wait()

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            dist.destroy_process_group()
