"""Benches: ours and theirs on the same work, interleaved in one run; only ratios travel."""

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from torchtune_qwen25vl import Qwen25VL, device
from torchtune_qwen25vl.model import products_by

BENCHES = (
    "image",
    "encoder",
    "generation",
    "training",
    "lessons",
    "captioning",
    "hidden_states",
    "conditioning",
    "cost",
)
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of a bench table; times in milliseconds."""

    case: str
    threads: int
    ours: float
    theirs: float
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        ratio = f"{self.theirs / self.ours:.2f}x"
        ours, theirs = f"{self.ours:.1f}", f"{self.theirs:.1f}"
        return self.case, str(self.threads), ours, theirs, ratio, self.note


COLUMNS = ("case", "threads", "ours ms", "theirs ms", "theirs / ours", "note")


class Line(Protocol):
    """A line of a table."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text."""


def run(name: str, peer: str | None = None) -> tuple[tuple[str, ...], Iterator[Line]]:
    """The columns of one bench, and its rows as they come: module parity.bench.NAME.

    Args:
        name: of the bench
        peer: another program to compare with, in function `rows_against`
    """
    module = importlib.import_module(f"parity.bench.{name}")
    rows = module.rows() if peer is None else module.rows_against(peer)
    return getattr(module, "COLUMNS", COLUMNS), rows


def as_in_jobs(model: Qwen25VL) -> Qwen25VL:
    """Have a model's weights as a job on this CPU would: packed, or as they are; return it."""
    device.use_kernels(model, device.choose(device.look("cpu"), {model.dtype}))
    return model


def as_in_training(work: Callable[[], T]) -> Callable[[], T]:
    """Have a CPU's products computed as the recipes of training would."""
    kernels, _ = device.choose_kernels(device.look("cpu"), "auto")

    def run() -> T:
        with products_by(kernels):
            return work()

    return run


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int, threads: int
) -> tuple[float, float]:
    """Medians in ms of interleaved repeats, after one warm-up of each, on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times: dict[Callable, list[float]] = {ours: [], theirs: []}
        for repeat in range(repeats + 1):
            for work, taken in times.items():
                start = time.perf_counter()
                work()
                if repeat:
                    taken.append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    return statistics.median(times[ours]), statistics.median(times[theirs])
