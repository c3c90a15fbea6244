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
from torchtune_qwen25vl.model._products import multiply


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    banned: tuple[int, ...] = (),
    chunk_rows: int = 1024,
) -> Tensor:
    """Compute the log-probability of each label under `hidden @ weight.T`, fp32 [n].

    The backward computes the logits of a chunk again, so that in neither direction more than one
    chunk's are held. Equal to the plain formula and its gradients but for rounding.

    Args:
        hidden: [n, d], after the final norm
        weight: [v, d], the output projection's (or the tied embedding's)
        labels: [n], what each row is to predict
        temperature: divides the logits
        banned: tokens that have no probability
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
    return apply_in_autocast(_LogProbs, hidden, weight, labels, temperature, banned, chunk_rows)


class _LogProbs(torch.autograd.Function):
    """Chosen entries of log_softmax(hidden @ weight.T), a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float,
        banned: tuple[int, ...],
        chunk_rows: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.options = temperature, banned, chunk_rows
        log_probs = hidden.new_empty(len(labels), dtype=in_precision(hidden))
        for rows in chunks(len(labels), chunk_rows):
            logits = _scores(hidden[rows], weight, temperature, banned)  # [chunk, v]
            chosen = logits.gather(-1, labels[rows, None]).squeeze(-1)
            log_probs[rows] = chosen - logits.logsumexp(-1)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        temperature, banned, chunk_rows = ctx.options
        grad = grad / temperature
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        for rows in chunks(len(labels), chunk_rows):
            scores = _scores(hidden[rows], weight, temperature, banned)
            logits_grad = scores.softmax(-1).mul_(-grad[rows, None])
            logits_grad.scatter_add_(-1, labels[rows, None], grad[rows, None])
            logits_grad = logits_grad.to(weight.dtype)  # [chunk, v]
            if hidden_grad is not None:
                multiply(logits_grad, weight.T, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, hidden[rows])
        return hidden_grad, weight_grad, *[None] * 4


def _scores(hidden: Tensor, weight: Tensor, temperature: float, banned: tuple[int, ...]) -> Tensor:
    """Compute what the softmax is taken of, [n, v]."""
    logits = project(hidden, weight)
    if temperature != 1.0:
        logits /= temperature
    if banned:
        logits[:, list(banned)] = -torch.inf
    return logits


def chunks(rows: int, size: int) -> list[slice]:
    """Cut rows into slices of at most so many."""
    return [slice(start, start + size) for start in range(0, rows, size)]


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """Compute logits of rows, [n, v], in the precision of a softmax."""
    return multiply(hidden, weight).to(in_precision(hidden))


def in_precision(hidden: Tensor) -> torch.dtype:
    """Return what a softmax is computed in: fp32, or fp64 where the model is in fp64."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
