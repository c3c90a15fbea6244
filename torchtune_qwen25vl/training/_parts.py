"""Vision encoder, merger and decoder: each is trained in its own way."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.model import Tuning, part_of
from torchtune_qwen25vl.training._kinds import ADAPTERS, PART, PARTS, Training, check_keys


@dataclass(frozen=True)
class Part:
    """How one part is trained.

    Args:
        train: "full" trains all weights, "lora" and "dora" adapters, "qlora" (decoder only) LoRA on
            weights in NF4
        lr: learning rate; only a part that is trained has one
        weight_decay: weight decay of all its trained weights; 0 by default

    Raises:
        ValueError: if an option is unknown, missing, or would have no effect.
    """

    train: Training
    lr: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if self.train not in get_args(Training):
            raise ValueError(f"train must be one of {list(get_args(Training))}, got {self.train!r}")
        if self.train == "frozen" and (self.lr is not None or self.weight_decay is not None):
            raise ValueError(
                f"a frozen part takes no lr and no weight_decay, got {self.lr} and "
                f"{self.weight_decay}; leave them out, or train it"
            )
        if self.train != "frozen" and self.lr is None:
            raise ValueError(f"a part with train {self.train!r} needs an lr of its own")


def read_parts(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Part]:
    """Read one `Part` for each of vision, merger and decoder.

    Raises:
        ValueError: if a part is missing or unknown, or its options are wrong.
    """
    if set(options) != set(PARTS):
        raise ValueError(f"parts must be {list(PARTS)}, got {list(options)}")
    parts = {}
    for name, section in options.items():
        check_keys(f"parts.{name}", section, PART)
        try:
            parts[name] = Part(**section)
        except (ValueError, TypeError) as error:
            raise ValueError(f"parts.{name}: {error}") from error
    return parts


def tuning(parts: Mapping[str, Part], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keyword arguments of `Tuning` for these parts.

    Args:
        parts: one `Part` for each of vision, merger and decoder
        adapters: lora_attn_modules, apply_lora_to_mlp, lora_rank, lora_alpha and lora_dropout of
            all parts that have adapters

    Raises:
        ValueError: if parts cannot be combined.
    """
    kinds = {part.train for part in parts.values()} - {"frozen", "full"}
    if len({kind == "dora" for kind in kinds}) > 1:
        raise ValueError(f"adapters are LoRA everywhere or DoRA everywhere, got {sorted(kinds)}")
    for name in ("vision", "merger"):
        if parts[name].train == "qlora":
            raise ValueError(f"only the decoder is held in NF4: {name} takes 'lora', not 'qlora'")
    if not kinds and adapters:
        raise ValueError(f"adapters are for parts with lora or dora, but none is: {dict(adapters)}")
    if "apply_lora_to_output" in adapters:
        raise ValueError(
            "apply_lora_to_output is not for this loss, which projects with the output's weight; "
            "leave it out"
        )
    check_keys("adapters", adapters, ADAPTERS)
    ways: dict[str, Any] = {
        f"{name}_trainable": part.train if part.train in ("frozen", "full") else "lora"
        for name, part in parts.items()
    }
    ways["use_dora"] = "dora" in kinds
    ways["quantize_base"] = parts["decoder"].train == "qlora"
    try:
        return asdict(Tuning(**ways, **adapters))
    except ValueError as error:
        raise ValueError(f"adapters: {error}") from error


def trained_names(model: nn.Module) -> list[str]:
    """List the names in the state dict of the weights that are trained."""
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return [plain_name(name) for name in names]


def plain_name(name: str) -> str:
    """Return the name of a weight without that of the wrapper which checkpoints activations."""
    return name.replace("_checkpoint_wrapped_module.", "")


def parameter_groups(model: nn.Module, parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Make the optimiser's groups: one for each trained part, with name, lr and weight_decay."""
    return [
        {
            "name": part,
            "params": [p for p in parameters_of(model, part) if p.requires_grad],
            "lr": how.lr,
            "weight_decay": how.weight_decay or 0.0,
        }
        for part, how in parts.items()
        if how.train != "frozen"
    ]


def parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """List all parameters of a part, trained or not."""
    return [parameter for name, parameter in model.named_parameters() if part_of(name) == part]


class GradientCheck:
    """Checks in the first steps that every trained part has gradients, and every frozen part none.

    A part without input has a gradient of zero, so vision and merger are checked in the first step
    that has an image or a video on any rank.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts
        self.pending = set(PARTS)

    def __call__(self, model: nn.Module, *, has_media: bool) -> None:
        """Check the gradients before the optimiser steps.

        Raises:
            ValueError: if a gradient is missing, zero or not finite, or if a frozen part has one.
        """
        now = self.pending if has_media else self.pending & {"decoder"}
        for name in sorted(now):
            self._check(name, parameters_of(model, name))
        self.pending = self.pending - now

    def _check(self, name: str, parameters: list[nn.Parameter]) -> None:
        train = self.parts[name].train
        norm = _norm(parameters)
        if train == "frozen":
            if any(p.requires_grad or p.grad is not None for p in parameters):
                raise ValueError(f"the {name} is frozen, yet it has gradients of norm {norm:.3g}")
        elif not 0 < norm < float("inf"):
            raise ValueError(
                f"the {name} is trained ({train}), so its gradient must be finite and not zero, "
                f"but its norm is {norm}; the step was not taken"
            )


def _norm(parameters: list[nn.Parameter]) -> float:
    """Compute the norm of all gradients, over all ranks."""
    squares = sum((g.float().square().sum() for g in _gradients(parameters)), torch.zeros(()))
    (total,) = _ranks.sums([float(squares)], parameters[0].device)
    return math.sqrt(total)


def _gradients(parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            yield gradient.to_local() if isinstance(gradient, DTensor) else gradient
