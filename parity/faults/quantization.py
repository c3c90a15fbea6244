"""Faults of weights in 4 bits."""

from typing import Any

import torch
from torch import nn
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.low_precision.nf4_linear import to_nf4

from parity.faults._fault import Fault, change, edited
from torchtune_qwen25vl.model import Int4Linear


def _displace_rows(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, FrozenNF4Linear):
            displaced = to_nf4(module.weight.get_original_weight().roll(1, 0))
            change(module, weight=nn.Parameter(displaced, requires_grad=False))


def _displace_zero_points(model: Any) -> None:
    for module in _int4_layers(model):
        scale, zero_point = module.scales.unbind(-1)  # each [g, o]
        change(module, scales=torch.stack((scale, zero_point.roll(1, 0)), -1))


def _double_one_scale(model: Any) -> None:
    """Of one group of one row of the model."""
    for layer in _int4_layers(model)[:1]:
        scales = layer.scales.clone()
        scales[0, 0, 0] *= 2
        change(layer, scales=scales)


def _swap_pairs(model: Any) -> None:
    """Two codes of a byte change places."""
    for module in _int4_layers(model):
        codes = module.weight.view(torch.uint8)
        change(module, weight=(codes << 4 | codes >> 4).view(module.weight.dtype))


def _int4_layers(model: Any) -> list[Int4Linear]:
    return [module for module in model.modules() if isinstance(module, Int4Linear)]


FAULTS: dict[str, Fault] = {
    "zero points of int4 displaced": edited(_displace_zero_points, "int4"),
    "one scale of int4 doubled": edited(_double_one_scale, "int4"),
    "codes of int4 in another order": edited(_swap_pairs, "int4"),
    "rows of NF4 weights displaced": edited(_displace_rows, "NF4"),
}
