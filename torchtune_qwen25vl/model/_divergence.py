"""How far a student's predictions are from a teacher's, without holding the logits of either.

With `T` and `S` the distributions of teacher and student, of `M = (1 - beta) * S + beta * T`::

    forward_kl  KL(T || S)                             the student covers what the teacher may say
    reverse_kl  KL(S || T)                             it keeps to what the teacher would say
    jsd         beta * KL(T || M) + (1 - beta) * KL(S || M)          between the two

Where the two vocabularies differ in rows, both end at the shorter one, before the softmax: the rows
above are padding that no tokenizer uses (3B has 151,936 rows, 7B and larger 152,064, and there are
151,665 tokens).

Shapes: n labelled tokens, d embed_dim, v vocab_size of each, w rows that both have.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtune_qwen25vl.model._autocast import apply_in_autocast
from torchtune_qwen25vl.model._log_probs import chunks, in_precision, project
from torchtune_qwen25vl.model._products import multiply

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    name: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_rows: int = 1024,
) -> Tensor:
    """Compute the divergence of each row of `hidden @ weight.T` from the teacher's, fp32 [n].

    The backward computes the logits of a chunk again, so that in neither direction more than one
    chunk's of either model are held. The teacher has no gradients.

    Args:
        hidden: the student's, [n, d], after the final norm
        weight: output projection of the student (or tied embedding), [v, d]
        teacher_hidden: the teacher's, for the same tokens, [n, d]
        teacher_weight: output projection of the teacher, [v, d]
        name: which divergence
        beta: the teacher's share of the mixture, for jsd
        temperature: divides the logits of both; divergences are not multiplied by its square
        chunk_rows: rows whose logits are held at a time (fp32: about 16 * v bytes a row)

    Raises:
        ValueError: if shapes do not go together, a weight is a shard, or there is no such name

    Source: https://arxiv.org/abs/2306.13649 (generalised Jensen-Shannon divergence).
    """
    _check(hidden, weight, "student")
    _check(teacher_hidden, teacher_weight, "teacher")
    if len(hidden) != len(teacher_hidden) or name not in get_args(Divergence):
        raise ValueError(
            f"linear_divergence needs as many rows of both and one of {get_args(Divergence)}, got "
            f"{len(hidden)}, {len(teacher_hidden)} and {name!r}"
        )
    teacher = teacher_hidden.detach().to(teacher_weight.dtype), teacher_weight.detach()
    share = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": beta}[name]
    return apply_in_autocast(_Divergence, hidden, weight, *teacher, share, temperature, chunk_rows)


class _Divergence(torch.autograd.Function):
    """The divergence with `beta` 0 for forward and 1 for reverse, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        beta: float,
        temperature: float,
        chunk_rows: int,
    ) -> Tensor:
        tensors = hidden, weight, teacher_hidden, teacher_weight
        ctx.save_for_backward(*tensors)
        ctx.options = beta, temperature, chunk_rows
        found = hidden.new_empty(len(hidden), dtype=in_precision(hidden))
        for rows, ours, theirs in _predictions(*tensors, temperature, chunk_rows):
            found[rows] = _divergences(ours, theirs, beta)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _, teacher_weight = ctx.saved_tensors
        beta, *options = ctx.options
        temperature, _ = options
        shared = weight[: len(teacher_weight)]  # [w, d]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight) if wants_weight else None
        for rows, ours, theirs in _predictions(*ctx.saved_tensors, *options):
            slope = _slopes(ours, theirs, beta).mul_(grad[rows, None] / temperature)
            slope = slope.to(weight.dtype)  # [chunk, w]
            if hidden_grad is not None:
                multiply(slope, shared.T, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad[: len(shared)].addmm_(slope.T, hidden[rows])
        return hidden_grad, weight_grad, *[None] * 5


def _predictions(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
    chunk_rows: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, and log-probabilities of the student and the teacher there, [chunk, w]."""
    for rows in chunks(len(hidden), chunk_rows):
        ours = project(hidden[rows], weight[: len(teacher_weight)])
        theirs = project(teacher_hidden[rows], teacher_weight[: len(weight)]).to(ours.dtype)
        yield (
            rows,
            (ours / temperature).log_softmax(-1),
            (theirs / temperature).log_softmax(-1),
        )


def _divergences(ours: Tensor, theirs: Tensor, beta: float) -> Tensor:
    """Compute the divergence of log-probabilities [n, w], [n]."""
    if beta == 0:
        return (theirs.exp() * (theirs - ours)).sum(-1)
    if beta == 1:
        return (ours.exp() * (ours - theirs)).sum(-1)
    mixture = _mixture(ours, theirs, beta)
    of_theirs = (theirs.exp() * (theirs - mixture)).sum(-1)
    return beta * of_theirs + (1 - beta) * (ours.exp() * (ours - mixture)).sum(-1)


def _slopes(ours: Tensor, theirs: Tensor, beta: float) -> Tensor:
    """Compute the gradient of the divergence with respect to the student's logits, [n, w]."""
    probabilities = ours.exp()
    if beta == 0:
        return probabilities - theirs.exp()
    gain = ours - theirs if beta == 1 else (1 - beta) * (ours - _mixture(ours, theirs, beta))
    mean = (probabilities * gain).sum(-1, keepdim=True)
    return probabilities * (gain - mean)


def _mixture(ours: Tensor, theirs: Tensor, beta: float) -> Tensor:
    """Log-probabilities of the mixture, [n, w]."""
    return torch.logaddexp(ours + math.log(1 - beta), theirs + math.log(beta))


def _check(hidden: Tensor, weight: Tensor, owner: str) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_divergence needs the {owner}'s hidden [n, d] and weight [v, d], but got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if isinstance(weight, DTensor):
        raise ValueError(
            f"linear_divergence needs the {owner}'s whole output weight, but got a shard "
            f"{weight.placements}; shard the root module with reshard_after_forward=False"
        )
