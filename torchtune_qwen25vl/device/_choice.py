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
FourBit = Literal["auto", "on", "off", "nf4", "int4"]
Format = Literal["nf4", "int4"]
CpuKernels = Literal["auto", Library]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = 12 * 10**9  # bytes; an accelerator with less holds the decoder in 4 bits
FORCE_4BIT = "QWEN_FORCE_4BIT"
WORDS = {"nf4": "NF4", "int4": "int4"}


@dataclass(frozen=True)
class Choice:
    """How a model is run, and why.

    Attributes:
        device: where the model goes
        dtype: dtype of the weights that are not in 4 bits
        attention: kernels that attention may use
        four_bit: format in which the decoder's layers are held; None for `dtype`
        cpu_kernels: library that multiplies, on a CPU; "onednn" has the weights packed once
        reasons: why, one phrase for each decision
    """

    device: torch.device
    dtype: torch.dtype
    attention: Attention
    four_bit: Format | None
    cpu_kernels: Library
    reasons: tuple[str, ...]

    @property
    def format(self) -> str:
        """Name the format of the weights in memory in one word."""
        return self.four_bit or _name(self.dtype)

    def __str__(self) -> str:
        weights = "not quantised"
        if self.four_bit is not None:
            weights = f"{WORDS[self.four_bit]} (vision tower and output not)"
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
            QWEN_FORCE_4BIT=1; "on" is int4 where that was measured to be faster, on a CPU in bf16,
            else NF4; "nf4" and "int4" are those formats
        cpu_kernels: "auto" is oneDNN with packed weights on a CPU of AMD, else what torch does

    Raises:
        ValueError: if the machine cannot do what is asked for.
    """
    for name, value, kinds in (
        ("dtype", dtype, get_args(Dtype)),
        ("attention", attention, get_args(Attention)),
        ("four_bit", four_bit, get_args(FourBit)),
        ("cpu_kernels", cpu_kernels, get_args(CpuKernels)),
    ):
        if value not in kinds:
            raise ValueError(f"{name} is one of {', '.join(kinds)}, got {value!r}")
    chosen, why_dtype = _dtype(machine, set(stored), dtype)
    quantised, why_four_bit = _four_bit(machine, chosen, four_bit)
    if attention == "flash" and (not machine.flash or chosen != torch.bfloat16):
        raise ValueError(
            f"attention 'flash' is not possible on {machine.name} ({machine.device}) with "
            f"{machine.versions} in {_name(chosen)}; use sdpa, or dtype=bf16 where there is bf16"
        )
    kernels, why_kernels = choose_kernels(machine, cpu_kernels)
    reasons = (f"{machine.name}, {machine.versions}", why_dtype, *why_four_bit, *why_kernels)
    return Choice(machine.device, chosen, attention, quantised, kernels, reasons)


def downgrades(choice: Choice, machine: Machine) -> Iterator[Choice]:
    """Yield the same choice with coarser and coarser numbers, for a model that does not fit."""
    if choice.dtype == torch.float32 and machine.bf16:
        reason = "bf16 as fp32 does not fit and allow_downgrade is set"
        choice = replace(choice, dtype=torch.bfloat16, reasons=(*choice.reasons, reason))
        yield choice
    if choice.four_bit is None:
        reason = "4 bits as nothing else fits and allow_downgrade is set"
        smallest: Format = "nf4"
        for four_bit in dict.fromkeys((_faster(machine, choice.dtype), smallest)):
            reasons = (*choice.reasons, reason, _price(four_bit, machine))
            yield replace(choice, four_bit=four_bit, reasons=reasons)


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


def _four_bit(
    machine: Machine, dtype: torch.dtype, asked: FourBit
) -> tuple[Format | None, tuple[str, ...]]:
    if asked == "off":
        return None, ("four_bit off was asked for",)
    if asked == "auto" and not (why := _wants_four_bit(machine)):
        return None, ()
    if asked == "int4":
        _refuse_int4(machine, dtype)
    chosen = asked if asked in ("nf4", "int4") else _faster(machine, dtype)
    reason = why if asked == "auto" else f"four_bit {asked} was asked for"
    return chosen, (reason, _price(chosen, machine))


def _wants_four_bit(machine: Machine) -> str:
    """Say why a machine that nobody gave a wish is to hold 4 bits; empty if it is not."""
    if os.environ.get(FORCE_4BIT) == "1":
        return f"4 bits as {FORCE_4BIT}=1"
    if machine.device.type != "cpu" and machine.total < SMALL:
        total = f"{machine.total / 1e9:.1f} GB"
        return f"4 bits as the device has {total}, less than 12; four_bit=off to refuse"
    return ""


def _refuse_int4(machine: Machine, dtype: torch.dtype) -> None:
    """Refuse int4 where it cannot be multiplied; in fp32 a CPU takes 9 to 80 times as long."""
    if not machine.int4:
        raise ValueError(
            f"{machine.versions} has no kernels for int4 on {machine.name}: set four_bit=nf4"
        )
    if dtype != torch.bfloat16:
        remedy = "dtype=bf16 or four_bit=nf4" if machine.bf16 else "four_bit=nf4"
        raise ValueError(f"int4 is multiplied in bf16, and this is {_name(dtype)}: set {remedy}")


def _faster(machine: Machine, dtype: torch.dtype) -> Format:
    """Return the faster format in 4 bits, of those that were measured on such a machine."""
    measured = machine.device.type == "cpu" and machine.int4 and dtype == torch.bfloat16
    return "int4" if measured else "nf4"


def _price(four_bit: Format, machine: Machine) -> str:
    """Say what 4 bits cost beside bf16.

    NF4 unpacks every weight whenever it is used: ten operations a layer, which move 24 bytes a
    weight where bf16 moves 2. Kernels for int4 read 0.56 bytes, but read and unpack them again
    for every few rows. On a CPU (Zen 4, one thread) layers of 3B took in NF4 17 to 42 times as
    long for one row, and 4 to 7 for 256. In int4 blocks of 3B took 0.33 times as long as torch's
    bf16 for a token of one row and 0.63 as oneDNN's, of eight rows 0.64 and 0.94.
    """
    cpu = machine.device.type == "cpu"
    if four_bit == "nf4":
        price = "17 to 42 times" if cpu else "about 5 to 10 times"
        said = f"NF4 takes {price} as long for a token as bf16"
    elif cpu:
        said = (
            "int4 takes 0.3 to 0.9 times as long for a token as bf16, and 1.4 to 1.8 for a prompt"
        )
    else:
        said = "int4 takes about 0.4 times as long for a token as bf16, and longer for a prompt"
    return f"{said} ({'measured on one CPU' if cpu else 'estimated'})"


def choose_kernels(machine: Machine, asked: CpuKernels) -> tuple[Library, tuple[str, ...]]:
    """Choose the library that multiplies on a CPU, and say why, if that was a choice.

    Raises:
        ValueError: if the library is not on this machine.
    """
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
