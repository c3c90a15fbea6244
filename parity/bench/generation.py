"""Speed of generation: the prompt with its image, then each greedy token after it."""

from collections.abc import Callable

import torch

from parity import reference
from parity.bench import Row, compare
from parity.inputs import make_inputs
from parity.trace import ours_like
from torchtune_qwen25vl._generation import generate

CASES = {  # model, side of the image in patches, new tokens, repeats
    "tiny": ("tiny", 8, 64, 21),
    "3B width, 2 layers": ("wide", 28, 16, 7),
}
TEXT = (5, 9)  # tokens before and after the image


def rows() -> list[Row]:
    """Prefill and one decoded token of every case, on one thread."""
    return [row for case in CASES for row in _rows(case)]


def _rows(case: str) -> list[Row]:
    name, side, new_tokens, repeats = CASES[case]
    theirs = reference.random_model(name)
    model = ours_like(theirs)
    inputs = make_inputs([[TEXT[0], (1, side, side), TEXT[1]]], reference.ids(theirs))

    def ours_for(n: int) -> Callable[[], torch.Tensor]:
        return lambda: generate(model, inputs.ours, max_new_tokens=n).tokens

    def theirs_for(n: int) -> Callable[[], torch.Tensor]:
        return lambda: reference.greedy(theirs, inputs, n)

    first = compare(ours_for(1), theirs_for(1), repeats=repeats, threads=1)
    whole = compare(ours_for(new_tokens), theirs_for(new_tokens), repeats=repeats, threads=1)
    ours, other = ((b - a) / (new_tokens - 1) for a, b in zip(first, whole, strict=True))
    same = torch.equal(ours_for(new_tokens)(), theirs_for(new_tokens)())
    note = "the same tokens" if same else "DIFFERENT tokens"
    prompt = f"prefill of {inputs.tokens.shape[1]} tokens"
    return [
        Row(f"{case}: {prompt}", 1, *first),
        Row(f"{case}: each of {new_tokens} tokens", 1, ours, other, note),
    ]
