"""A batch on its way to a device, for which the host does not wait."""

from typing import Any

import torch
from torch import Tensor


def batch_to_device(
    batch: dict[str, Any], device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Move the tensors of a batch, in place, but those that the host reads to cut rows into pieces.

    Args:
        batch: of a collate
        device: device of the model
        dtype: dtype of the model, in which pixels travel; the encoder rounds them to it anyhow
    """
    for key, value in batch.items():
        if isinstance(value, dict):
            batch_to_device(value, device, dtype)
        elif isinstance(value, Tensor) and not _stays(key, value):
            batch[key] = _moved(value, device, dtype if key == "pixel_values" else None)


def _stays(key: str, value: Tensor) -> bool:
    """Say whether these are grids, or the lengths of packed samples."""
    return key == "grid_thw" or (key == "mask" and value.ndim == 1)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if device.type == "cpu":
        return tensor.to(device)
    tensor = tensor.to(dtype or tensor.dtype)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # from other memory, the copy would wait for the device
    return tensor.to(device, non_blocking=True)
