"""Weights onto a device: a model on the meta device gets them one at a time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchtune_qwen25vl._torchtune import NF4Tensor, to_nf4
from torchtune_qwen25vl.model import Int4Linear


def materialize(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Give a model on the meta device all its weights.

    What is held in NF4 or int4 is quantised on the device, so that no two weights are there in
    full. A weight that is on the device in its dtype already is not copied.

    Args:
        model: module on the meta device, which is filled
        weights: every weight of the model, by its name in tune layout
        device: where the weights go
        dtype: of all weights; by default each keeps its own
    """
    nf4 = {name for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor)}
    int4 = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    state = {}
    for name, weight in weights:
        placed = weight.to(device=device, dtype=dtype)
        if name in int4:
            int4[name].fill(placed)
        else:
            state[name] = to_nf4(placed) if name in nf4 else placed
    model.load_state_dict(state, assign=True)
    compute_frequencies(model, device)


def compute_frequencies(model: nn.Module, device: torch.device | str) -> None:
    """Compute on a device what no file holds: the frequencies of the rotations."""
    with torch.device(device):
        for module in model.modules():
            rope_init: Any = getattr(module, "rope_init", None)
            if rope_init is not None:
                rope_init()
