"""Where two answers part: the first stage of the data flow that differs, and the first token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parity.serve._answers import Answer

PIXELS = 2e-6  # fp32 normalization, in another order
LOGPROBS = 1e-4  # fp32 noise of a whole model
TIE = 0.1  # two tokens whose log-probabilities are as near as this, bf16 may take either
ROUNDED = 0.2  # noise of bf16, several times what is measured of random and trained models


@dataclass(frozen=True)
class Comparison:
    """One question, ours against theirs.

    Attributes:
        stage: the first stage that differs; "" where none does
        what: what differs there
        logprobs: largest difference of a chosen token's log-probability, up to the first token that
            differs
        ties: whether the first token that differs is one that rounding decides
        deviation: what vLLM does otherwise, where that explains the whole answer
    """

    stage: str = ""
    what: str = ""
    logprobs: float = 0.0
    ties: bool = False
    deviation: str = ""

    @property
    def same(self) -> bool:
        """Whether the answers are the same, but for what rounding decides."""
        return not self.stage or self.ties

    @property
    def differs(self) -> bool:
        """Whether they are not, and nothing explains it."""
        return not self.same and not self.deviation

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.deviation:
            return "deviation"
        return "differs" if self.differs else "a tie" if self.ties else "the same"


def compare(ours: Answer, theirs: Answer, *, rounded: bool = False) -> Comparison:
    """Compare the answers to one question.

    Args:
        ours: with margins
        theirs: of a peer
        rounded: whether theirs computes in bf16, and ours in fp32
    """
    common = _common(ours.tokens, theirs.tokens)
    shared = zip(ours.logprobs[:common], theirs.logprobs[:common], strict=True)
    difference = max((abs(a - b) for a, b in shared), default=0.0)
    if found := _inputs(ours, theirs):
        return Comparison(*found, difference)
    if common < min(len(ours.tokens), len(theirs.tokens)):
        assert ours.margins is not None
        said = f"token {common} is {ours.tokens[common]} and {theirs.tokens[common]}"
        said += f", margin {ours.margins[common]:.1e}"
        return Comparison("logits", said, difference, rounded and ours.margins[common] < TIE)
    if difference > (ROUNDED if rounded else LOGPROBS):
        return Comparison("logits", f"log-probabilities differ by {difference:.1e}", difference)
    return Comparison(logprobs=difference)


def _inputs(ours: Answer, theirs: Answer) -> tuple[str, str] | None:
    """The first difference before the model computes anything."""
    if theirs.grids is not None and ours.grids != theirs.grids:
        return "pixels", f"grids {ours.grids} and {theirs.grids}"
    if ours.patches is not None and theirs.patches is not None:
        error = float(np.abs(ours.patches - theirs.patches).max())
        if error > PIXELS:
            return "pixels", f"patches differ by {error:.1e}"
    if theirs.prompt is not None and ours.prompt != theirs.prompt:
        assert ours.prompt is not None
        first = _common(ours.prompt, theirs.prompt)
        return "tokens", f"prompts of {len(ours.prompt)} and {len(theirs.prompt)}, part at {first}"
    if theirs.positions is not None and ours.positions != theirs.positions:
        assert ours.positions is not None
        first = _common(ours.positions, theirs.positions)
        return "positions", f"token {first}: {ours.positions[first]}, {theirs.positions[first]}"
    return None


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many elements are equal from the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))
