"""Faults of distillation: what the teacher sees, and how the two are held against each other."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl.model import linear_divergence
from torchtune_qwen25vl.training import Distillation


def _without_temperature(right: Callable) -> Callable:
    return lambda *args, **options: right(*args, **{**options, "temperature": 1.0})


def _shifted(right: Callable) -> Callable:
    def wrong(hidden: Tensor, weight: Tensor, teacher: Tensor, *args: Any, **options: Any) -> Any:
        return right(hidden, weight, teacher.roll(1, 0), *args, **options)

    return wrong


def _dropped_after_softmax(right: Callable) -> Callable:
    """The teacher's share of the rows that the student lacks is lost, not shared out."""

    def wrong(
        hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, **options: Any
    ) -> Tensor:
        theirs = (teacher @ teacher_weight.T / options["temperature"]).softmax(-1)
        kept = theirs[:, : len(weight)].sum(-1)
        return kept * right(hidden, weight, teacher, teacher_weight, **options)

    return wrong


class _Blind:
    """A teacher that sees no images."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def __call__(self, *args: Any, encoder_input: Any = None, **options: Any) -> Any:
        if encoder_input is not None:
            vision = encoder_input["vision"]
            blank = torch.zeros_like(vision["pixel_values"])
            encoder_input = {"vision": {**vision, "pixel_values": blank}}
        return self.teacher(*args, encoder_input=encoder_input, **options)


def _without_images(right: Callable) -> Callable:
    def wrong(self: Distillation, model: Any, batch: Any) -> Tensor:
        other: Any = copy.copy(self)
        other.teacher = _Blind(self.teacher)
        return right(other, model, batch)

    return wrong


FAULTS: dict[str, Fault] = {
    "temperature missing": replaced(linear_divergence, _without_temperature, "distill"),
    "teacher's labels shifted": replaced(linear_divergence, _shifted, "distill"),
    "rows above the student's dropped after the softmax": replaced(
        linear_divergence, _dropped_after_softmax, "distill"
    ),
    "teacher without images": replaced(Distillation, _without_images, "distill", method="__call__"),
}
