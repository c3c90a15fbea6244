"""Several processes on one list of images, started by torchrun; or one alone."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=30)  # a rank may wait for the others as long as captions take


class Ranks:
    """This process among its equals. They exchange lists and wait for each other, no tensors."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that plans and merges."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them.

        Raises:
            ValueError: on all ranks, if the first one cannot make it.
        """
        values: list[Any] = [None, None]
        if self.is_first:
            try:
                values = [make(), None]
            except (ValueError, OSError) as error:
                values = [None, str(error)]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        made, problem = values
        if problem is not None:
            raise ValueError(problem)
        return made

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the others."""
        if self.size > 1:
            dist.destroy_process_group()
