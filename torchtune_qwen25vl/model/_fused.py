"""Pieces between the matrix products, which a GPU runs as one kernel each.

torch runs a formula operation by operation, and each operation reads and writes all of its tensor:
turning the queries of a layer is six passes over them. A GPU, which is fast at arithmetic and slow
at memory, is given these pieces compiled.
"""

import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune import modules

Piece = Callable[..., Tensor]


def fused(plain: Piece) -> Piece:
    """Compile a function of tensors for a GPU, at its first call there.

    Elsewhere, and within a layer that is compiled as a whole, it runs as it is written. So it does
    where it cannot be compiled, with a warning that says why.
    """
    compiled: list[Piece] = []

    @functools.wraps(plain)
    def run(*tensors: Tensor) -> Tensor:
        if not tensors[0].is_cuda or torch.compiler.is_compiling():
            return plain(*tensors)
        if not compiled:
            compiled.append(_compiled(plain))
        return compiled[0](*tensors)

    return run


def _compiled(plain: Piece) -> Piece:
    piece: list[Piece] = [torch.compile(plain, dynamic=True)]

    def run(*tensors: Tensor) -> Tensor:
        try:
            return piece[0](*tensors)
        except RuntimeError as error:
            if piece[0] is plain or isinstance(error, torch.OutOfMemoryError):
                raise
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"{plain.__name__} runs uncompiled, and slower: {why}", stacklevel=3)
            piece[0] = plain
            return plain(*tensors)

    return run


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute SiLU(gate) * up, all of one shape."""
    return F.silu(gate) * up


class FeedForward(modules.FeedForward):
    """torchtune's gated MLP, whose gate is one kernel on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform [..., d]."""
        assert self.w3 is not None
        return self.w2(swiglu(self.w1(x), self.w3(x)))
