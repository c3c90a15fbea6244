"""What the processes of one run, started by torchrun, tell each other.

A process without a process group is the first and only rank: it waits for nobody.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torchtune import utils

T = TypeVar("T")


def is_first() -> bool:
    """Say whether this rank is the one that makes folders, writes logs and decides."""
    return utils.get_world_size_and_rank()[1] == 0


def wait() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: T) -> T:
    """Return the first rank's value, on every rank."""
    values: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, in their order, on every rank."""
    values: list[Any] = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def sums(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Return the sum of each number over all ranks, added in fp64 on the device of the ranks."""
    if not dist.is_initialized():
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def largest(number: int, device: torch.device) -> int:
    """Return the largest of a number over all ranks."""
    if not dist.is_initialized():
        return number
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
