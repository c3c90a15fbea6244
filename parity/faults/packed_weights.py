"""Faults of weights that are packed for oneDNN."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl.model._packed import PackedEmbedding, PackedLinear

STAGE = "packed weights"


def _without_bias(right: Callable) -> Callable:
    def wrong(self: PackedLinear, x: Tensor) -> Tensor:
        out = right(self, x)
        return out if self.bias is None else out - self.bias

    return wrong


def _next_token(right: Callable) -> Callable:
    def wrong(self: Any, tokens: Tensor) -> Tensor:
        return right(self, (tokens - 1).clamp(min=0))

    return wrong


def _shifted(right: Callable) -> Callable:
    def wrong(self: PackedEmbedding, x: Tensor) -> Tensor:
        out = right(self, x)
        return out.roll(1, -1)

    return wrong


FAULTS: dict[str, Fault] = {
    "a packed bias lost": replaced(PackedLinear, _without_bias, STAGE, method="forward"),
    "a packed embedding's neighbour": replaced(
        PackedEmbedding, _next_token, STAGE, method="forward"
    ),
    "packed logits shifted": replaced(PackedEmbedding, _shifted, STAGE, method="project"),
}
