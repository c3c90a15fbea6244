"""Speed of generation: the prompt with its image, then each greedy token after it.

Beside the tokens stands how fast the weights were read for them, and how fast memory can be read.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from parity import reference
from parity.bench import Row, as_in_jobs
from parity.inputs import make_inputs
from parity.trace import ours_like
from torchtune_qwen25vl import Qwen25VL, generate

CASES = {  # model, side of the image in patches, rows, new tokens, repeats
    "tiny": ("tiny", 8, 1, 64, 21),
    "3B width, 2 layers": ("wide", 28, 1, 16, 7),
    "3B width, 2 layers, 8 rows": ("wide", 28, 8, 16, 3),
}
TEXT = (5, 9)  # tokens before and after the image
READ = 2**28  # bytes that are read to measure the memory, far more than caches hold


class Run(NamedTuple):
    """One run, in milliseconds."""

    first: float  # up to the first token
    steps: list[float]  # from token to token
    tokens: torch.Tensor


Generate = Callable[[Callable[[], None]], torch.Tensor]  # calls back at every token


def rows() -> Iterator[Row]:
    """Prefill and one decoded token of every case, on one thread and on all."""
    for threads in sorted({1, torch.get_num_threads()}):
        for case in CASES:
            yield from _rows(case, threads)


def _rows(case: str, threads: int) -> list[Row]:
    name, side, count, new_tokens, repeats = CASES[case]
    theirs = reference.random_model(name)
    plain = ours_like(theirs)
    size = _bytes_a_token(plain)
    model = as_in_jobs(plain)
    inputs = make_inputs([[TEXT[0], (1, side, side), TEXT[1]]] * count, reference.ids(theirs))

    def ours(on_token: Callable[[], None]) -> torch.Tensor:
        return generate(
            model, inputs.ours, max_new_tokens=new_tokens, on_token=lambda tokens: on_token()
        ).tokens

    def other(on_token: Callable[[], None]) -> torch.Tensor:
        return reference.greedy(theirs, inputs, new_tokens, on_token)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = _in_turn((ours, other), repeats)
        memory = _bandwidth()
    finally:
        torch.set_num_threads(before)
    firsts = [statistics.median(run.first for run in side) for side in runs]
    steps = [statistics.median(step for run in side for step in run.steps) for side in runs]
    same = torch.equal(runs[0][0].tokens, runs[1][0].tokens)
    read = f"weights at {size / steps[0] / 1e6:.1f} GB/s, memory {memory:.1f}"
    note = f"{'the same' if same else 'DIFFERENT'} tokens; {read}"
    prompt = f"prefill of {count} x {inputs.tokens.shape[1]} tokens"
    return [
        Row(f"{case}: {prompt}", threads, firsts[0], firsts[1]),
        Row(f"{case}: each of {new_tokens} tokens", threads, steps[0], steps[1], note),
    ]


def _bytes_a_token(model: Qwen25VL) -> int:
    """The bytes of the weights that one step of decoding reads."""
    read: list[nn.Module] = [*model.layers, model.norm, model.output]
    return sum(weight.nbytes for part in read for weight in part.parameters())


def _bandwidth() -> float:
    """Bytes a nanosecond that a sum over much memory reads, at best of several."""
    data = torch.ones(READ // 4)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return READ / min(times) / 1e9


def _in_turn(sides: tuple[Generate, Generate], repeats: int) -> list[list[Run]]:
    """So many runs of both, one after the other, after one that does not count."""
    turns = [[_run(side) for side in sides] for _ in range(repeats + 1)]
    return [list(runs) for runs in zip(*turns[1:], strict=True)]


def _run(side: Generate) -> Run:
    times = [time.perf_counter()]
    tokens = side(lambda: times.append(time.perf_counter()))
    first, *steps = (1e3 * (end - start) for start, end in itertools.pairwise(times))
    return Run(first, steps, tokens)
