"""What weights are held in, what is computed in, and what gradients of several ranks are added in.

bf16_stochastic  weights in bf16, which the optimiser rounds up or down at random, so that each
                 takes its updates on average: 2 bytes a weight, and 4 of moments
bf16_mixed       weights in fp32, products in bf16: 4 bytes a weight, and 8 of moments
fp32             all in fp32
bf16             weights in bf16, rounded to the nearest: for adapters of LoRA, which are small and
                 whose rates are large enough; the magnitudes of DoRA are as large as weights
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torchtune import training

from torchtune_qwen25vl._rounding import ROUNDING, is_stochastic, lost_updates

Precision = Literal["bf16_stochastic", "bf16_mixed", "fp32", "bf16"]
P = ParamSpec("P")
R = TypeVar("R")


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """Return what weights are held in.

    Raises:
        RuntimeError: if the device has no bf16.
    """
    held = "bf16" if precision in ("bf16", "bf16_stochastic") else "fp32"
    if precision == "bf16_mixed":
        training.get_dtype("bf16", device)  # refuses a device without it
    return training.get_dtype(held, device)


def computed_in(
    precision: Precision, device: torch.device, model: nn.Module, work: Callable[P, R]
) -> Callable[P, R]:
    """Have a forward compute its products in bf16, where fp32 weights ask for it.

    A sharded model does so by itself.
    """

    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        mixes = precision == "bf16_mixed" and not isinstance(model, FSDPModule)
        with torch.autocast(device.type, torch.bfloat16) if mixes else nullcontext():
            return work(*args, **kwargs)

    return computed


def shard(model: nn.Module, precision: Precision) -> None:
    """Shard every layer, and what is left, by FSDP2; gradients are added in fp32.

    Inputs are not cast: rotations stay in fp32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16_mixed" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for name, module in reversed(list(model.named_modules())):
        if training.get_shard_conditions(name, module):
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def problem_of(
    precision: Precision, optimizer: Mapping[str, Any], trained: Mapping[str, str]
) -> str:
    """Say why a precision does not go with the rest of a YAML, and what would; empty if it does.

    Args:
        precision: as the YAML has it
        optimizer: its section
        trained: how each part is trained, see `Part`
    """
    name = str(optimizer.get("_component_", "")).rpartition(".")[2]
    large = [part for part, how in trained.items() if how in ("full", "dora")]
    if precision == "bf16_stochastic" and large and not is_stochastic(optimizer):
        return lost_updates(large[0], name)
    if precision == "bf16" and large:
        return (
            f"precision bf16 is for adapters of LoRA alone: {large[0]} has larger weights, most of "
            f"which an AdamW that rounds to the nearest leaves as they are. Set "
            f"optimizer._component_={ROUNDING} with precision=bf16_stochastic, or "
            "precision=bf16_mixed, or precision=fp32"
        )
    if precision == "bf16_mixed" and "qlora" in trained.values():
        return (
            "precision bf16_mixed holds all weights in fp32, and a part with qlora holds them in "
            "NF4: take bf16_stochastic"
        )
    return ""
