"""One step of training: forward and backward of its batches, checks, and the optimiser.

Shapes: b rows, s tokens, n labelled tokens, d embed_dim, v vocab_size.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import utils

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl._torchtune import labelled_rows, targets
from torchtune_qwen25vl.model import Qwen25VL, labelled_cross_entropy, linear_log_probs
from torchtune_qwen25vl.training._parts import GradientCheck

Kernel = Literal["torch", "liger"]
OF_LABELS = ("labels", "label_rows", "label_weights", "total_weight")  # not the model's arguments


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        loss: mean over all labels of the step, on all ranks
        labels: how many there were, or the sum of their weights
        grad_norm: norm of all gradients, before clipping
    """

    loss: float
    labels: float
    grad_norm: float


def summed_loss(
    model: Qwen25VL, batch: Mapping[str, Any], *, chunk_rows: int = 1024, kernel: Kernel = "torch"
) -> Tensor:
    """Summed cross entropy of a batch, projecting the labelled rows only.

    Args:
        model: on the batch's device
        batch: keyword arguments of the model, "labels" [b, s], and where the collate knew them,
            "label_rows", see `label_rows`, and weights, see `weigh`
        chunk_rows: see `linear_cross_entropy`
        kernel: see `linear_cross_entropy`

    Raises:
        ValueError: if labels have weights, and the kernel knows none.
    """
    rows = label_rows(batch)
    hidden = model(**inputs_of(batch), output_mask=rows, output="hidden", add_to_grad=True)
    return summed_cross_entropy(
        hidden, output_weight(model), batch, chunk_rows=chunk_rows, kernel=kernel
    )


def summed_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    batch: Mapping[str, Any],
    *,
    chunk_rows: int,
    kernel: Kernel = "torch",
) -> Tensor:
    """Sum the cross entropy of the labels of a batch, each times its weight if it has one.

    Args:
        hidden: hidden states of the labelled rows, [n, d]
        weight: the output's, [v, d]
        batch: as for `summed_loss`
        chunk_rows: see `linear_cross_entropy`
        kernel: see `linear_cross_entropy`

    Raises:
        ValueError: if labels have weights, and the kernel knows none.
    """
    labels = targets(batch["labels"]).flatten()[label_rows(batch)]  # [n]
    if "label_weights" not in batch:
        mean = labelled_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows, kernel=kernel)
        return mean * len(labels)
    if kernel != "torch":
        raise ValueError(
            f"loss_kernel {kernel!r} knows no weights of labels, but rows or messages have "
            "some; use 'torch'"
        )
    log_probs = linear_log_probs(hidden, weight, labels, chunk_rows=chunk_rows)
    return -(batch["label_weights"] * log_probs).sum()


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's arguments in a batch: all but what is known of its labels."""
    return {key: value for key, value in batch.items() if key not in OF_LABELS}


def output_weight(model: Qwen25VL) -> nn.Parameter:
    """The weight that projects to the vocabulary, [v, d]: the embedding's, where they are tied."""
    output: Any = model.output
    return getattr(output, "tied_module", output).weight


def label_rows(batch: Mapping[str, Any]) -> Tensor:
    """Return the indices among b * s of the tokens that have a target, int64 [n].

    A collate makes them under this key; else the device has to be asked.
    """
    if "label_rows" in batch:
        return batch["label_rows"]
    return labelled_rows(batch["labels"]).flatten().nonzero()[:, 0]


def weigh(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return "label_weights" [n] of the labelled rows of a batch, and their sum, "total_weight".

    Args:
        batch: batch of a collate, with "label_weights" [b, s], on the CPU
    """
    weights = targets(batch["label_weights"], ignore_index=0).flatten()[label_rows(batch)]
    return {"label_weights": weights, "total_weight": float(weights.double().sum())}


def labels_of(batch: Mapping[str, Any]) -> float:
    """Count the labels of a batch, or sum their weights."""
    return batch.get("total_weight", len(label_rows(batch)))


def train_step(
    model: Qwen25VL,
    optimizer: Optimizer,
    batches: Sequence[Mapping[str, Any]],
    *,
    scheduler: LRScheduler | None = None,
    max_grad_norm: float | None = None,
    check: GradientCheck | None = None,
    loss: Callable[[Qwen25VL, Mapping[str, Any]], Tensor] = summed_loss,
    count: Callable[[Mapping[str, Any]], float] = labels_of,
) -> StepResult:
    """Accumulate the gradients of all batches, then step once.

    The loss is the mean over the labels of all batches of all ranks, however they are cut into
    batches, so that every labelled token weighs the same. Every rank must have as many batches.

    Args:
        model: in training mode
        optimizer: of its trained parameters
        batches: each the model's keyword arguments and "labels", on the model's device
        scheduler: stepped after the optimiser
        max_grad_norm: gradients are scaled down to this norm
        check: looks at the gradients before they are used
        loss: summed loss of one batch
        count: how much is summed there, over which the mean is taken

    Raises:
        ValueError: if loss or gradients are not finite, or the check fails. The weights are as they
            were.
    """
    world_size, _ = utils.get_world_size_and_rank()
    device = batches[0]["tokens"].device
    labels = sum(count(batch) for batch in batches)
    media = sum("encoder_input" in batch for batch in batches)
    all_labels, all_media = _ranks.sums([labels, media], device)
    all_labels = int(all_labels) if all_labels % 1 == 0 else all_labels

    # ranks share the encoder's collectives: where one has media, those without take part as well
    shared = {"encode_absent": dist.is_initialized() and all_media > 0}
    total = torch.zeros((), device=device)
    for batch in batches:
        summed = loss(model, {**batch, **shared})
        # sharded gradients are averaged over ranks, so each rank scales its own up
        (summed * (world_size / (all_labels or 1))).backward()
        total += summed.detach()
    if check is not None:
        check(model, has_media=all_media > 0)
    trained = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
    summed_here, grad_norm = torch.stack((total, whole.float())).tolist()  # the device's only wait
    mean = _ranks.sums([summed_here], device)[0] / (all_labels or 1)
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise ValueError(
            f"loss and gradients must be finite, but the loss is {mean} and the gradients' norm "
            f"{grad_norm}; the step was not taken. Is the learning rate too high?"
        )
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scheduler is not None:
        scheduler.step()
    return StepResult(mean, all_labels, grad_norm)


@torch.no_grad()
def mean_loss(
    model: Qwen25VL,
    batches: Iterable[Mapping[str, Any]],
    *,
    device: torch.device,
    loss: Callable[[Qwen25VL, Mapping[str, Any]], Tensor] = summed_loss,
    count: Callable[[Mapping[str, Any]], float] = labels_of,
) -> float:
    """Mean loss over all labels of all batches of all ranks, without dropout.

    Every rank must have as many batches.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, labels
    for batch in batches:
        sums += torch.tensor([float(loss(model, batch)), count(batch)], dtype=sums.dtype)
    model.train()
    total, all_labels = _ranks.sums(sums.tolist(), device)
    return total / (all_labels or 1)
