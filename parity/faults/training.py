"""Faults of training: what is trained, and on which labels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl.model import _component_builders
from torchtune_qwen25vl.training import _batches


def _train_everything(right: Callable) -> Callable:
    def wrong(model: Any, tune: Any) -> None:
        right(model, tune)
        model.requires_grad_(True)

    return wrong


def _keep_first_labels(right: Callable) -> Callable:
    def wrong(samples: Sequence[Any], padding_idx: int, **kwargs: Any) -> dict[str, Any]:
        packed = right(samples, padding_idx, **kwargs)
        kept = torch.cat([torch.as_tensor(sample["labels"]) for sample in samples])
        packed["labels"][0, : len(kept)] = kept
        return packed

    return wrong


FAULTS: dict[str, Fault] = {
    "a frozen part trained": patched(
        _component_builders, "_set_trainable", _train_everything, "training"
    ),
    "first packed label kept": patched(_batches, "packed_collate", _keep_first_labels, "training"),
}
