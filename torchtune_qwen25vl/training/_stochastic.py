"""AdamW whose bf16 weights are rounded stochastically, so that small updates are not lost.

A weight in bf16 has 8 significant bits: an update below half of the last one leaves it as it is. At
the rates of fine-tuning that is the fate of most weights. Rounded up or down at random, with the
odds of what is cut off, a weight takes each update on average.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer


class StochasticAdamW(Optimizer):
    """AdamW, computed in fp32, with stochastic rounding of what is held in bf16.

    Weights and both moments are rounded. What is held in fp32 is trained as by torch's AdamW. The
    numbers are drawn from torch's generator of the device, which the recipe seeds in every step.

    Args:
        params: parameters, or groups of them
        lr: learning rate, unless a group has its own
        betas: decay of the two moments
        eps: number added to the root of the second moment
        weight_decay: weight decay, unless a group has its own

    Source: arXiv 2010.06192; torchao has the same as `_AdamW(bf16_stochastic_round=True)`, whose
    0.15 fails on sharded weights (https://github.com/pytorch/ao/issues/2296).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step, without a closure.

        Raises:
            ValueError: if ranks hold copies of a weight, which each would round in its own way.
        """
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], group)


def _update(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    if not state:
        state["step"] = torch.zeros(())
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    state["step"] += 1
    step, rate, betas = int(state["step"]), float(group["lr"]), group["betas"]
    held = [_local(tensor) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
    weight, mean, square = (tensor.float() for tensor in held)  # those in fp32 are not copied
    gradient = _local(parameter.grad).float()
    weight.mul_(1 - rate * group["weight_decay"])
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = square.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(group["eps"])
    weight.addcdiv_(mean, root, value=-rate / (1 - betas[0] ** step))
    for kept, exact in zip(held, (weight, mean, square), strict=True):
        if kept is not exact:
            kept.copy_(round_stochastically(exact))


def round_stochastically(exact: Tensor) -> Tensor:
    """Round fp32 numbers to bf16, up or down with the odds of what is cut off."""
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device)
    bits = (exact.view(torch.int32) + noise) & -(1 << 16)  # bf16 is the upper half of fp32
    return bits.view(torch.float32).bfloat16()


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    if not isinstance(tensor, DTensor):
        return tensor
    copies = [
        size
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True)
        if isinstance(placement, Replicate)
    ]
    if math.prod(copies) > 1:
        raise ValueError(
            "StochasticAdamW rounds on each rank for itself, so no weight may lie on several, but "
            f"one of shape {list(tensor.shape)} does; set optimizer._component_=torch.optim.AdamW, "
            "or share no layer among devices (tensor_parallel_dim=1)"
        )
    return tensor.to_local()
