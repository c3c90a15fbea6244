"""Products of linear layers and of their gradients, by the faster of the CPU's two libraries.

torch hands products in fp32 to MKL. oneDNN, which torch carries too, is the faster one on a CPU of
AMD. Within `products_by` these can be its; weights are not packed, as training changes them, so
that it gains for many rows, in which packing them takes little of the time, and for a few.

Shapes: n rows, i width of the input, o width of the output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_qwen25vl.model._autocast import product_dtype

Library = Literal["torch", "onednn"]

FEW, MANY = range(2, 9), 128  # rows for which oneDNN gains; between them MKL is as fast, or faster
LEAST_WIDTH = 256  # of input and output; below it, MKL is as fast

_onednn: ContextVar[Literal["never", "gains", "always"]] = ContextVar("onednn", default="never")


@contextmanager
def products_by(library: Library, *, always: bool = False) -> Iterator[None]:
    """Compute products in fp32 on a CPU by this library, in this thread.

    Args:
        library: "torch" leaves them to torch
        always: whether oneDNN multiplies what is small too, which MKL does faster
    """
    token = _onednn.set("never" if library == "torch" else "always" if always else "gains")
    try:
        yield
    finally:
        _onednn.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project [..., i] to [..., o], weight [o, i], bias [o]."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return out.unflatten(0, x.shape[:-1])


def multiply(rows: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Compute rows @ weight.T, [n, i] and [o, i] to [n, o], without a gradient of its own."""
    if not _is_for_onednn(rows, weight):
        return torch.mm(rows, weight.T, out=out)
    product = by_onednn(rows, weight)
    return product if out is None else out.copy_(product)


class Linear(nn.Linear):
    """A linear layer of the model."""

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., i] to [..., o]."""
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """rows @ weight.T + bias, and its three gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return by_onednn(rows, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            by_onednn(grad, weight.T) if wants_rows else None,
            by_onednn(grad.T, rows.T) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or _onednn.get() == "never" or not x.numel():
        return False
    is_known = weight.device.type == "cpu" and weight.dtype == torch.float32 == product_dtype(x)
    return is_known and (_onednn.get() == "always" or _gains(x.shape[:-1].numel(), weight))


def _gains(rows: int, weight: Tensor) -> bool:
    return min(weight.shape) >= LEAST_WIDTH and (rows in FEW or rows >= MANY)


def by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute rows @ weight.T + bias, [n, i] to [n, o]; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
