"""Faults of training: what is trained, and on which labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from parity.faults._fault import Fault, edited, replaced
from torchtune_qwen25vl import packed_collate
from torchtune_qwen25vl.training import parameter_groups
from torchtune_qwen25vl.training._stochastic import round_stochastically


def _train_everything(model: Any) -> None:
    model.requires_grad_(True)


def _keep_first_labels(right: Callable) -> Callable:
    def wrong(samples: Sequence[Any], padding_idx: int, **options: Any) -> dict[str, Any]:
        packed = right(samples, padding_idx, **options)
        kept = torch.cat([torch.as_tensor(sample["labels"]) for sample in samples])
        packed["labels"][0, : len(kept)] = kept
        return packed

    return wrong


def _no_decay(right: Callable) -> Callable:
    return lambda *args: [group | {"weight_decay": 0.0} for group in right(*args)]


def _to_the_nearest(right: Callable) -> Callable:
    return lambda exact: exact.bfloat16()


FAULTS: dict[str, Fault] = {
    "a frozen part trained": edited(_train_everything, "training"),
    "first packed label kept": replaced(packed_collate, _keep_first_labels, "training"),
    "weight decay lost": replaced(parameter_groups, _no_decay, "training"),
    "updates rounded to the nearest": replaced(
        round_stochastically, _to_the_nearest, "updates survive"
    ),
}
