"""Speed of the vision encoder from small to large pictures, with and without full attention.

Windows make its cost proportional to the number of patches; only the layers in which a patch sees
the whole picture cost more. One picture a time, heads as wide as the published ones, few of them.
"""

import math
from collections.abc import Iterator

import torch

from parity import reference
from parity.bench import Row, as_in_jobs, compare
from parity.inputs import make_inputs
from parity.trace import ours_like

GRIDS = ((1, 16, 16), (1, 32, 32), (1, 64, 64), (1, 128, 128))  # 256 to 16,384 patches
MODELS = {"encoder, windows": "windows only", "encoder, one full layer": "one layer of three full"}


def rows() -> Iterator[Row]:
    """Every size by every model, on one thread and on all."""
    yield from (
        _row(name, grid, threads)
        for threads in sorted({1, torch.get_num_threads()})
        for name in MODELS
        for grid in GRIDS
    )


def _row(name: str, grid: tuple[int, int, int], threads: int) -> Row:
    theirs = reference.random_model(name)
    model, patches = as_in_jobs(ours_like(theirs)).vision, math.prod(grid)
    inputs = make_inputs([[1, grid, 1]], reference.ids(theirs))
    ours = torch.no_grad()(lambda: model(inputs.pixel_values, inputs.grid_thw))
    other = torch.no_grad()(lambda: reference.encode(theirs, inputs))
    repeats = max(3, min(31, 40_000 // patches))
    milliseconds = compare(ours, other, repeats=repeats, threads=threads)
    note = f"{1e3 * milliseconds[0] / patches:.1f} us a patch"
    return Row(f"{patches:,} patches, {MODELS[name]}", threads, *milliseconds, note)
