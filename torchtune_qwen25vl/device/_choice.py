"""Device, dtype and attention: one choice, with its reasons in one line of the log.

No value is rounded in silence. A dtype that does not hold every stored value is chosen only if the
caller asks for it, the device is small, or nothing else fits and `allow_downgrade` is set. The
model overflows in float16, which is therefore never chosen.
"""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtune_qwen25vl.device._machine import Machine
from torchtune_qwen25vl.model import Library

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "bf16", "fp32"]
Attention = Literal["sdpa", "flash", "eager"]
FourBit = Literal["auto", "on", "off"]
CpuKernels = Library | Literal["auto"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = 12 * 10**9  # bytes; an accelerator with less holds the decoder in 4 bits
FORCE_4BIT = "QWEN_FORCE_4BIT"


@dataclass(frozen=True)
class Choice:
    """How a model is run, and why.

    Attributes:
        device: where the model goes
        dtype: dtype of the weights that are not in NF4
        attention: kernels that attention may use
        four_bit: whether the decoder's layers are held in NF4
        cpu_kernels: library that multiplies, on a CPU; "onednn" has the weights packed once
        reasons: why, one phrase for each decision
    """

    device: torch.device
    dtype: torch.dtype
    attention: Attention
    four_bit: bool
    cpu_kernels: Library
    reasons: tuple[str, ...]

    @property
    def format(self) -> str:
        """Name the format of the weights in memory in one word."""
        return "nf4" if self.four_bit else _name(self.dtype)

    def __str__(self) -> str:
        weights = "NF4 (vision tower and output not)" if self.four_bit else "not quantised"
        facts = [str(self.device), _name(self.dtype), f"{self.attention} attention", weights]
        if self.device.type == "cpu":
            facts.append(f"{self.cpu_kernels} kernels")
        return f"{', '.join(facts)}: {'; '.join(self.reasons)}"


def choose(
    machine: Machine,
    stored: Iterable[torch.dtype],
    *,
    dtype: Dtype = "auto",
    attention: Attention = "sdpa",
    four_bit: FourBit = "auto",
    cpu_kernels: CpuKernels = "auto",
) -> Choice:
    """Choose how to run a model on a machine.

    Args:
        machine: what torch says of the machine
        stored: dtypes of the weights on disk
        dtype: "auto" is bf16 where the machine has it and the files hold nothing finer, else fp32
        attention: "sdpa" leaves each call to torch; "flash" refuses a machine where torch
            has no flash attention; "eager" is plain arithmetic, for debugging
        four_bit: "auto" is on for an accelerator with less than 12 GB, or if the environment has
            QWEN_FORCE_4BIT=1
        cpu_kernels: "auto" is oneDNN with packed weights on a CPU of AMD, else what torch does

    Raises:
        ValueError: if the machine cannot do what is asked for.
    """
    for name, value, kinds in (
        ("dtype", dtype, get_args(Dtype)),
        ("attention", attention, get_args(Attention)),
        ("four_bit", four_bit, get_args(FourBit)),
    ):
        if value not in kinds:
            raise ValueError(f"{name} is one of {', '.join(kinds)}, got {value!r}")
    chosen, why_dtype = _dtype(machine, set(stored), dtype)
    quantised, why_four_bit = _four_bit(machine, four_bit)
    if attention == "flash" and (not machine.flash or chosen != torch.bfloat16):
        raise ValueError(
            f"attention 'flash' is not possible on {machine.name} ({machine.device}) with "
            f"{machine.versions} in {_name(chosen)}; use sdpa, or dtype=bf16 where there is bf16"
        )
    kernels, why_kernels = choose_kernels(machine, cpu_kernels)
    price = (_price_of_nf4(machine),) if quantised else ()
    reasons = (
        *(f"{machine.name}, {machine.versions}", why_dtype),
        *(*why_four_bit, *price, *why_kernels),
    )
    return Choice(machine.device, chosen, attention, quantised, kernels, reasons)


def downgrades(choice: Choice, machine: Machine) -> Iterator[Choice]:
    """Yield the same choice with coarser and coarser numbers, for a model that does not fit."""
    if choice.dtype == torch.float32 and machine.bf16:
        reason = "bf16 as fp32 does not fit and allow_downgrade is set"
        choice = replace(choice, dtype=torch.bfloat16, reasons=(*choice.reasons, reason))
        yield choice
    if not choice.four_bit:
        reason = "4 bits as nothing else fits and allow_downgrade is set"
        yield replace(
            choice, four_bit=True, reasons=(*choice.reasons, reason, _price_of_nf4(machine))
        )


@contextmanager
def attention_kernels(choice: Choice) -> Iterator[None]:
    """Restrict torch's attention to the kernels of the choice."""
    kernels = {
        "eager": [SDPBackend.MATH],
        "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    }
    if choice.attention == "sdpa":
        yield
        return
    with sdpa_kernel(kernels[choice.attention], set_priority=True):
        yield


def _dtype(machine: Machine, stored: set[torch.dtype], asked: Dtype) -> tuple[torch.dtype, str]:
    files = ", ".join(sorted(map(_name, stored)))
    if asked == "bf16" and not machine.bf16:
        raise ValueError(
            f"{machine.name} has no bf16 of its own; set dtype=fp32, which holds every bf16 "
            "number and takes twice the memory"
        )
    if asked != "auto":
        return DTYPES[asked], f"{asked} was asked for, the files hold {files}"
    if not machine.bf16:
        return torch.float32, f"fp32 as there is no bf16, the files hold {files}"
    if stored <= {torch.bfloat16}:
        return torch.bfloat16, "bf16 as in the files"
    return torch.float32, f"fp32 as the files hold {files}; dtype=bf16 takes half the memory"


def _four_bit(machine: Machine, asked: FourBit) -> tuple[bool, tuple[str, ...]]:
    if asked != "auto":
        return asked == "on", (f"four_bit {asked} was asked for",)
    if os.environ.get(FORCE_4BIT) == "1":
        return True, (f"4 bits as {FORCE_4BIT}=1",)
    if machine.device.type != "cpu" and machine.total < SMALL:
        total = f"{machine.total / 1e9:.1f} GB"
        return True, (f"4 bits as the device has {total}, less than 12; four_bit=off to refuse",)
    return False, ()


def _price_of_nf4(machine: Machine) -> str:
    """Say what tokens cost where every weight is unpacked whenever it is used.

    That is ten operations a layer, which move 24 bytes a weight where bf16 moves 2. On a CPU (Zen
    4, one thread) layers of 3B took 17 to 42 times as long for one row, and 4 to 7 for 256.
    """
    if machine.device.type == "cpu":
        return "NF4 takes 17 to 42 times as long for a token as bf16 (measured on one CPU)"
    return "NF4 takes about 5 to 10 times as long for a token as bf16 (estimated)"


def choose_kernels(machine: Machine, asked: CpuKernels) -> tuple[Library, tuple[str, ...]]:
    """Choose the library that multiplies on a CPU, and say why, if that was a choice.

    Raises:
        ValueError: if there is no such library, or not on this machine.
    """
    if asked not in ("auto", *get_args(Library)):
        raise ValueError(f"cpu_kernels is one of auto, torch, onednn, got {asked!r}")
    if asked == "onednn" and machine.device.type != "cpu":
        raise ValueError(
            f"cpu_kernels onednn is for a CPU, the model goes to {machine.device}: leave it out, "
            "or set device=cpu"
        )
    if asked == "onednn" and not torch.backends.mkldnn.is_available():
        raise ValueError(
            f"torch {torch.__version__} was built without oneDNN: set cpu_kernels=torch"
        )
    if asked != "auto":
        return asked, (f"cpu_kernels {asked} was asked for",)
    if machine.onednn:
        return "onednn", ("oneDNN kernels as the CPU is AMD's",)
    return "torch", ()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
