"""What torch and the operating system say of the machine."""

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from torchtune_qwen25vl.model import multiplies_int4

CGROUP = Path("/sys/fs/cgroup")
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """A device as it is now.

    Attributes:
        device: where a model would go
        name: name of the hardware
        total: bytes of its memory
        free: bytes that no process uses
        bf16: whether the hardware has instructions for bfloat16
        flash: whether torch can run its flash attention for a vision layer there
        versions: versions of torch and of the device's driver
        onednn: whether oneDNN is known to be the faster one of a CPU's two libraries for products
        int4: whether torch has kernels there that multiply in int4
    """

    device: torch.device
    name: str
    total: int
    free: int
    bf16: bool
    flash: bool
    versions: str
    onednn: bool = False
    int4: bool = False


def look(device: str = "auto", *, ranks: int = 1) -> Machine:
    """Describe a device: by default the accelerator that torch finds, or else the CPU.

    Args:
        device: "auto", or a device of torch; "cuda" without a number is this local rank's
        ranks: number of processes that share the host's memory, if the device uses that

    Raises:
        ValueError: if torch cannot use the device.
    """
    chosen = _device(device)
    if chosen.type == "cuda":
        return _look_at_cuda(chosen)
    free, total = (size // ranks for size in _host_memory())
    versions = f"torch {torch.__version__}"
    if chosen.type == "cpu":
        facts = {"onednn": _prefers_onednn(), "int4": _has_int4(chosen)}
        return Machine(chosen, "CPU", total, free, _cpu_bf16(), False, versions, **facts)
    bf16 = _can_make_bf16(chosen)
    return Machine(chosen, chosen.type, total, free, bf16, False, versions)


def _device(device: str) -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = (found or "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device is auto, cpu, or what torch calls one such as cuda:1, got {device!r}"
        ) from error
    if chosen.type != "cpu" and (found is None or chosen.type != found.type):
        raise ValueError(
            f"torch {torch.__version__} cannot use {device}, it finds "
            f"{found.type if found else 'no accelerator'}: mend the driver or install another "
            "torch, or set device=cpu"
        )
    if chosen.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if chosen.index is None else chosen.index
        if index >= torch.accelerator.device_count():
            raise ValueError(
                f"there is no cuda:{index}, torch sees {torch.accelerator.device_count()} devices"
            )
        return torch.device("cuda", index)
    return chosen


def _look_at_cuda(device: torch.device) -> Machine:
    free, total = torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return Machine(
        device,
        torch.cuda.get_device_name(device),
        total,
        free,
        bf16,
        _can_use_flash(device, torch.bfloat16 if bf16 else torch.float32),
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, driver for CUDA "
        f"{driver // 1000}.{driver % 1000 // 10}",
        int4=_has_int4(device),
    )


def _can_use_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Ask torch about the published vision layers: 16 heads of 80."""
    x = torch.empty(1, 16, 64, 80, dtype=dtype, device=device)
    make: Any = torch.backends.cuda.SDPAParams
    parameters = make(x, x, x, None, 0.0, False, False)
    return torch.backends.cuda.can_use_flash_attention(parameters)


def _cpu_bf16() -> bool:
    """Say whether the CPU has instructions for bfloat16; without them torch is slower."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _has_int4(device: torch.device) -> bool:
    return multiplies_int4(device)  # which multiplies to find out, and a run looks several times


def _prefers_onednn() -> bool:
    """Say whether the CPU is AMD's: there MKL, which torch asks by default, is the slower one.

    Asked of the name, not of a clock, so that a run which goes on computes as it began.
    """
    try:
        name = CPU_INFO.read_text()
    except OSError:
        name = platform.processor()
    return "AuthenticAMD" in name and torch.backends.mkldnn.is_available()


def _can_make_bf16(device: torch.device) -> bool:
    try:
        return bool((torch.ones(2, dtype=torch.bfloat16, device=device) + 1).sum().item() == 4)
    except (RuntimeError, TypeError):
        return False


def _host_memory() -> tuple[int, int]:
    """Return free and total bytes, of the container if there is one."""
    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free, total = min(free, limit - used), min(total, limit)
    return max(free, 0), total


def _cgroup(name: str) -> int | None:
    try:
        text = (CGROUP / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
