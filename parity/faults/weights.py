"""Faults of the weight conversion."""

from collections.abc import Callable

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl.weights import _names


def _exchange_two(right: Callable) -> Callable:
    return lambda row, parts: right(row, [parts[k] for k in (1, 0, 2)] if parts[1:] else parts)


FAULTS: dict[str, Fault] = {
    "q and k exchanged on saving": patched(_names, "joined", _exchange_two, "weights"),
}
