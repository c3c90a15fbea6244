"""What a stage is: one comparison of ours with theirs, its tolerance, and its control."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from parity.faults import Fault
from parity.reference import RefusalError
from parity.trace import ours_like
from torchtune_qwen25vl import Qwen25VL
from torchtune_qwen25vl.model import pack


@dataclass(frozen=True)
class Setting:
    """What the run was asked for."""

    device: str = "cpu"
    checkpoint: str | None = None  # a folder or hub id; None: random-weight models
    small: bool = False  # the smallest models only, enough to see a fault
    fault: Fault | None = None  # what is wrong with ours
    packs: bool = False  # the weights of ours for oneDNN

    def ours_like(self, theirs: nn.Module) -> Qwen25VL:
        """Build our model with their weights, and with the fault, if there is one."""
        model = self.faulty(ours_like(theirs))
        return pack(model, least_weights=1) if self.packs else model

    def faulty(self, model: Qwen25VL) -> Qwen25VL:
        """Put the fault, if there is one, into a model of ours; return the model."""
        if self.fault is not None:
            self.fault.edit(model)
        return model


@dataclass(frozen=True)
class Measurement:
    """One case: the largest element-wise difference, and what it may be."""

    case: str
    error: float
    tolerance: float = 0.0
    pictures: tuple[tuple[str, Image.Image], ...] = ()  # what a person would look at
    refusal: str = ""  # the exception that theirs raised, and why; there is no difference then


def refused(case: str, refusal: RefusalError) -> Measurement:
    """A case in which theirs has no answer: it fails unless `parity.deviations` names it."""
    return Measurement(case, math.inf, refusal=str(refusal))


@dataclass(frozen=True)
class Stage:
    """One comparison, run clean and again under a seeded fault that it must see."""

    name: str
    what: str
    tolerance: str  # in words, with its reason
    fault: str  # the control: a key of parity.faults.FAULTS
    measure: Callable[[Setting], Iterator[Measurement]]


def max_error(ours: Any, theirs: Any) -> float:
    """Largest |ours - theirs|, compared in fp64; inf where shapes or finiteness differ."""
    a, b = torch.as_tensor(ours), torch.as_tensor(theirs)
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    difference = (a.double() - b.double()).abs()
    return float(difference.max()) if difference.isfinite().all() else float("inf")


def relative_frobenius(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||; inf where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def gradient_error(ours: Qwen25VL, theirs: dict[str, Tensor]) -> float:
    """Relative difference of the gradients of the worst parameter."""
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert found.keys() == theirs.keys()
    gradients = {n: torch.zeros_like(theirs[n]) if g is None else g for n, g in found.items()}
    return max(relative_frobenius(gradients[name], theirs[name]) for name in theirs)
