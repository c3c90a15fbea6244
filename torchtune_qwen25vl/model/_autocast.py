"""Autocast, for what it does not reach: functions with a backward of their own."""

from typing import Any

import torch
from torch import Tensor


def is_autocast(tensor: Tensor) -> bool:
    """Say whether products on the device of a tensor are computed in another dtype."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def apply_in_autocast(function: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Apply an autograd function to the factors of a product, in the dtype of autocast."""
    if not is_autocast(hidden):
        return function.apply(hidden, weight, *rest)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        return function.apply(hidden.to(dtype), weight.to(dtype), *rest)
