"""One measured figure, and how work on a device is timed."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """What is measured: true sizes, or small ones that try the script."""

    models: tuple[str, ...]
    image: tuple[int, int, int]  # t, h, w in patches
    text: int  # tokens around an image
    batches: tuple[int, ...]
    new_tokens: int
    photos: int
    in_four_bits: str  # the model whose layers are also held in 4 bits


TRUE = Sizes(("3B", "7B"), (1, 64, 80), 52, (1, 8, 32), 64, 256, "3B")
TINY = Sizes(("tied",), (1, 8, 12), 12, (1, 3), 8, 12, "tiny, whole blocks")


@dataclass(frozen=True)
class Figure:
    """One line of the table; `theirs` is of transformers on the same work."""

    work: str
    ours: float
    unit: str = "ms"
    theirs: float | None = None
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        theirs = "" if self.theirs is None else f"{self.theirs:.4g}"
        gain = "" if not self.theirs else f"{self.gain:.2f}x"
        return self.work, f"{self.ours:.4g}", theirs, self.unit, gain, self.note

    @property
    def gain(self) -> float:
        """How many times better ours is: less of time and memory, more of a rate."""
        assert self.theirs
        rate = "/s" in self.unit or "%" in self.unit
        return self.ours / self.theirs if rate else self.theirs / self.ours


COLUMNS = ("work", "ours", "theirs", "unit", "gain", "note")


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device, *, repeats: int = 3) -> float:
    """Return the median time of a piece of work, after one run to warm up."""
    taken = []
    for repeat in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if repeat:
            taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def peak_gib(work: Callable[[], object], device: torch.device) -> float:
    """Return the most memory in use during a piece of work, weights included; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    wait(device)
    return torch.cuda.max_memory_allocated(device) / 2**30
