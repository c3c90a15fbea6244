"""Autocast, for what it does not reach: functions with a backward of their own."""

from typing import Any

import torch
from torch import Tensor


def product_dtype(factor: Tensor) -> torch.dtype:
    """Return the dtype in which a product with this factor is computed."""
    return torch.get_autocast_dtype(factor.device.type) if _is_on(factor) else factor.dtype


def apply_in_autocast(function: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Apply an autograd function to the factors of a product, in the dtype of autocast."""
    if not _is_on(hidden):
        return function.apply(hidden, weight, *rest)
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return function.apply(hidden.to(dtype), weight.to(dtype), *rest)


def _is_on(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
