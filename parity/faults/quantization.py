"""Faults of weights in 4 bits."""

from typing import Any

from torch import nn
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.low_precision.nf4_linear import to_nf4

from parity.faults._fault import Fault, change, edited


def _displace_rows(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, FrozenNF4Linear):
            displaced = to_nf4(module.weight.get_original_weight().roll(1, 0))
            change(module, weight=nn.Parameter(displaced, requires_grad=False))


FAULTS: dict[str, Fault] = {
    "rows of NF4 weights displaced": edited(_displace_rows, "NF4"),
}
