"""Log-probabilities of labelled tokens, without holding their logits.

What preference, distillation and policy losses are made of: each row's own log-probability, where
`linear_cross_entropy` has only their mean.

Shapes: n labelled tokens, d embed_dim, v vocab_size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtune_qwen25vl.model._autocast import apply_in_autocast


def linear_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_rows: int = 1024
) -> Tensor:
    """Compute the log-probability of each label under `hidden @ weight.T`, fp32 [n].

    The backward computes the logits of a chunk again, so that in neither direction more than one
    chunk's are held. Equal to the plain formula and its gradients but for rounding.

    Args:
        hidden: [n, d], after the final norm
        weight: [v, d], the output projection's (or the tied embedding's)
        labels: [n], what each row is to predict
        chunk_rows: rows whose logits are held at a time (fp32: 4 * v bytes a row)

    Raises:
        ValueError: if shapes differ, or the weight is a shard
    """
    if hidden.ndim != 2 or hidden.shape[:1] != labels.shape or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_log_probs needs hidden [n, d], weight [v, d], labels [n], but got "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(labels.shape)}"
        )
    if isinstance(weight, DTensor):
        raise ValueError(
            f"linear_log_probs needs the whole output weight, but got a shard "
            f"{weight.placements}; shard the root module with reshard_after_forward=False"
        )
    return apply_in_autocast(_LogProbs, hidden, weight, labels, chunk_rows)


class _LogProbs(torch.autograd.Function):
    """Chosen entries of log_softmax(hidden @ weight.T), a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk_rows = chunk_rows
        log_probs = hidden.new_empty(len(labels), dtype=_precision(hidden))
        for rows in _chunks(len(labels), chunk_rows):
            logits = _logits(hidden[rows], weight)  # [chunk, v]
            chosen = logits.gather(-1, labels[rows, None]).squeeze(-1)
            log_probs[rows] = chosen - logits.logsumexp(-1)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        for rows in _chunks(len(labels), ctx.chunk_rows):
            logits_grad = _logits(hidden[rows], weight).softmax(-1).mul_(-grad[rows, None])
            logits_grad.scatter_add_(-1, labels[rows, None], grad[rows, None])
            logits_grad = logits_grad.to(weight.dtype)  # [chunk, v]
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, hidden[rows])
        return hidden_grad, weight_grad, None, None


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).to(_precision(hidden))


def _precision(hidden: Tensor) -> torch.dtype:
    """Return what softmax is computed in: fp32, or fp64 where the model is in fp64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
