"""Cross entropy of labelled rows only.

In image-heavy data 10 to 25% of the tokens carry a label, and a row of logits is 151,936 numbers:
projecting the other rows is most of the memory and much of the time of a training step.

- ``LabelledRowsLoss`` is a torchtune loss component for the stock recipes. The collate names the
  rows (``labelled_rows`` under the key "output_mask"), the model projects these alone, and the
  loss picks the labels that belong to them.
- ``linear_cross_entropy`` takes hidden states and the output weight, and never holds the logits of
  more than ``chunk_rows`` rows.

Shapes: b rows of a batch, s tokens, n labelled tokens, d embed_dim, v vocab_size.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl.model._autocast import apply_in_autocast
from torchtune_qwen25vl.model._products import multiply

Kernel = Literal["torch", "liger"]


class LabelledRowsLoss(nn.Module):
    """Mean cross entropy of logits that the model computed for labelled rows only.

    Use it as ``loss`` in a stock recipe, together with a collate that puts ``labelled_rows`` into
    the batch as "output_mask". A batch without labels has loss 0 and gradients 0, so that a rank
    that drew one does not stop the others.
    """

    def __init__(self, ignore_index: int = CROSS_ENTROPY_IGNORE_IDX) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean negative log-likelihood.

        Args:
            logits: [n, v], rows in the order of the labels
            labels: [b * s], already shifted, with n labels other than ignore_index

        Raises:
            ValueError: if there is not one row of logits for each label
        """
        labels = labels[labels != self.ignore_index]  # [n]
        if len(logits) != len(labels):
            raise ValueError(
                f"LabelledRowsLoss needs one row of logits for each label, but there are "
                f"{len(logits)} rows and {len(labels)} labels; "
                f"does the collate put labelled_rows(labels) under 'output_mask'?"
            )
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        return total / max(len(labels), 1)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = CROSS_ENTROPY_IGNORE_IDX,
    chunk_rows: int = 1024,
    kernel: Kernel = "torch",
) -> Tensor:
    """Mean cross entropy of ``hidden @ weight.T``, without holding these logits.

    Equal to the plain loss and its gradients but for rounding. The gradients are made in the
    forward, chunk by chunk, so nothing is projected twice. No label at all gives 0, gradients too.

    Args:
        hidden: [..., d], after the final norm
        weight: [v, d], the output projection's (or the tied embedding's)
        labels: [...], what each position is to predict, so already shifted
        ignore_index: what stands where there is no label
        chunk_rows: labelled rows whose logits are held at a time (fp32: 4 * v bytes a row)
        kernel: "liger" is liger-kernel's fused Triton kernel, for CUDA

    Raises:
        ValueError: if shapes differ, the weight is a shard, or there is no such kernel
        ImportError: if kernel is "liger" and liger-kernel is not installed

    Reference: Liger Kernel, https://arxiv.org/abs/2410.10989 (gradients in the forward).
    """
    _check(hidden, weight, labels, kernel)
    labelled = labels != ignore_index
    return labelled_cross_entropy(
        hidden[labelled], weight, labels[labelled], chunk_rows=chunk_rows, kernel=kernel
    )


def labelled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_rows: int = 1024,
    kernel: Kernel = "torch",
) -> Tensor:
    """Do as `linear_cross_entropy` with rows that all have a label, without asking the device.

    Args:
        hidden: [n, d], after the final norm
        weight: [v, d]
        labels: [n]
        chunk_rows: as there
        kernel: as there

    Raises:
        ValueError, ImportError: as there.
    """
    _check(hidden, weight, labels, kernel)
    if not torch.is_grad_enabled():  # else an autograd function is told that gradients are wanted
        hidden, weight = hidden.detach(), weight.detach()
    if kernel == "liger" and len(labels):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        return fused(weight, hidden, labels)
    return apply_in_autocast(_MeanCrossEntropy, hidden, weight, labels, chunk_rows)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, kernel: str) -> None:
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy needs hidden [..., d], weight [v, d], labels [...], but got "
            f"{list(hidden.shape)}, {list(weight.shape)} and {list(labels.shape)}"
        )
    if isinstance(weight, DTensor):
        raise ValueError(
            f"linear_cross_entropy needs the whole output weight, but got a shard "
            f"{weight.placements}; shard the root module with reshard_after_forward=False"
        )
    if kernel not in ("torch", "liger"):
        raise ValueError(f"kernel must be 'torch' or 'liger', got {kernel!r}")


class _MeanCrossEntropy(torch.autograd.Function):
    """Mean over rows of the cross entropy of hidden @ weight.T, gradients made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_rows: int
    ) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        make = torch.empty_like if len(labels) else torch.zeros_like
        weight_grad = make(weight) if wants_weight else None
        mean = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk_grad = None if hidden_grad is None else hidden_grad[rows]
            grads = chunk_grad, weight_grad, int(start > 0)
            mean += _chunk(hidden[rows], weight, labels[rows, None], len(labels), *grads)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, mean_grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # in place: a second copy of the weight's gradient would be as large as the weight
        hidden_grad, weight_grad = (
            None if grad is None else grad.mul_(mean_grad) for grad in ctx.saved_tensors
        )
        return hidden_grad, weight_grad, None, None


def _chunk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: int,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
    beta: int,
) -> Tensor:
    """A chunk's share of the mean over rows; writes hidden_grad, adds to beta * weight_grad."""
    logits = multiply(hidden, weight).float()  # [chunk, v], the only large buffer in fp32
    peak, expected = logits.amax(-1, keepdim=True), logits.gather(-1, target)  # [chunk, 1]
    exponentials = logits.sub_(peak).exp_()
    norm = exponentials.sum(-1, keepdim=True)  # [chunk, 1]
    if hidden_grad is not None or weight_grad is not None:
        logits_grad = exponentials.div_(norm * rows)
        logits_grad.scatter_add_(-1, target, torch.full_like(expected, -1 / rows))
        logits_grad = logits_grad.to(weight.dtype)
        if hidden_grad is not None:
            multiply(logits_grad, weight.T, out=hidden_grad)
        if weight_grad is not None:
            weight_grad.addmm_(logits_grad.T, hidden, beta=beta)
    return (norm.log() + peak - expected).sum() / rows
