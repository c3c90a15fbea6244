"""Speed of generation: the prompt with its image, then each greedy token after it."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from parity import reference
from parity.bench import Row
from parity.inputs import make_inputs
from parity.trace import ours_like
from torchtune_qwen25vl import generate

CASES = {  # model, side of the image in patches, new tokens, repeats
    "tiny": ("tiny", 8, 64, 21),
    "3B width, 2 layers": ("wide", 28, 16, 7),
}
TEXT = (5, 9)  # tokens before and after the image


class Run(NamedTuple):
    """One run, in milliseconds."""

    first: float  # up to the first token
    steps: list[float]  # from token to token
    tokens: torch.Tensor


Generate = Callable[[Callable[[], None]], torch.Tensor]  # calls back at every token


def rows() -> Iterator[Row]:
    """Prefill and one decoded token of every case, on one thread."""
    for case in CASES:
        yield from _rows(case)


def _rows(case: str) -> list[Row]:
    name, side, new_tokens, repeats = CASES[case]
    theirs = reference.random_model(name)
    model = ours_like(theirs)
    inputs = make_inputs([[TEXT[0], (1, side, side), TEXT[1]]], reference.ids(theirs))

    def ours(on_token: Callable[[], None]) -> torch.Tensor:
        return generate(
            model, inputs.ours, max_new_tokens=new_tokens, on_token=lambda tokens: on_token()
        ).tokens

    def other(on_token: Callable[[], None]) -> torch.Tensor:
        return reference.greedy(theirs, inputs, new_tokens, on_token)

    runs = _in_turn((ours, other), repeats)
    firsts = [statistics.median(run.first for run in side) for side in runs]
    steps = [statistics.median(step for run in side for step in run.steps) for side in runs]
    same = torch.equal(runs[0][0].tokens, runs[1][0].tokens)
    note = "the same tokens" if same else "DIFFERENT tokens"
    prompt = f"prefill of {inputs.tokens.shape[1]} tokens"
    return [
        Row(f"{case}: {prompt}", 1, firsts[0], firsts[1]),
        Row(f"{case}: each of {new_tokens} tokens", 1, steps[0], steps[1], note),
    ]


def _in_turn(sides: tuple[Generate, Generate], repeats: int) -> list[list[Run]]:
    """So many runs of both, one after the other, on one thread, after one that does not count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [[_run(side) for side in sides] for _ in range(repeats + 1)]
    finally:
        torch.set_num_threads(before)
    return [list(runs) for runs in zip(*turns[1:], strict=True)]


def _run(side: Generate) -> Run:
    times = [time.perf_counter()]
    tokens = side(lambda: times.append(time.perf_counter()))
    first, *steps = (1e3 * (end - start) for start, end in itertools.pairwise(times))
    return Run(first, steps, tokens)
