"""A batch that may not fit into memory, or hold one bad item: what fails, fails alone."""

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

from torchtune_qwen25vl.device import is_out_of_memory, release_cache

logger = logging.getLogger(__name__)
Q = TypeVar("Q")
A = TypeVar("A")


def refuse_nan(reasons: Sequence[str]) -> None:
    """Stop a run whose model gives nothing but nan and infinities.

    Args:
        reasons: why what came of each item of a batch is not finite; empty where it is

    Raises:
        ValueError: if nothing of a batch is finite.
    """
    if reasons and all(reasons):
        raise ValueError(
            f"no answer of a batch is finite ({reasons[0]}): set another dtype, or look into the "
            "weights; then start again with --retry-failed"
        )


class InHalves(Generic[Q, A]):
    """Do work on batches; where memory runs out in halves, where an item is bad one by one.

    Args:
        work: makes one result for each item of a batch; rows of a batch do not see each other
        refused: makes the result of an item that work refuses alone, from the ValueError
        too_large: makes the result of an item for which memory runs out alone
        halved: notes on an item that its batch was halved, in words
    """

    def __init__(
        self,
        work: Callable[[Sequence[Q]], list[A]],
        *,
        refused: Callable[[Q, ValueError], A],
        too_large: Callable[[Q], A],
        halved: Callable[[Q, str], Q] = lambda item, _: item,
    ) -> None:
        self._work, self._refused, self._too_large = work, refused, too_large
        self._halved = halved

    def __call__(self, items: Sequence[Q], device: torch.device) -> list[A]:
        """Return the results of all items, in their order.

        Raises:
            RuntimeError: of the device, other than that memory ran out.
        """
        if not items:
            return []
        problem = None
        try:
            return self._work(items)
        except ValueError as error:
            problem = error.with_traceback(None)  # it would hold on to the memory of its frames
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        if problem is not None and len(items) == 1:
            return [self._refused(items[0], problem)]
        if problem is not None:  # one row has the problem
            return [result for item in items for result in self([item], device)]
        release_cache(device)
        if len(items) == 1:
            return [self._too_large(items[0])]
        logger.warning("out of memory with a batch of %d: halved", len(items))
        marked = [self._halved(item, f"batch of {len(items)} halved") for item in items]
        half = (len(marked) + 1) // 2
        return self(marked[:half], device) + self(marked[half:], device)
