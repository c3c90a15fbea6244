"""Faults of weights in 4 bits."""

from collections.abc import Callable

from torch import Tensor

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl.weights import _materialize


def _displaced(right: Callable) -> Callable:
    def wrong(weight: Tensor) -> Tensor:
        return right(weight.roll(1, 0))

    return wrong


FAULTS: dict[str, Fault] = {
    "rows of NF4 weights displaced": patched(_materialize, "to_nf4", _displaced, "NF4"),
}
