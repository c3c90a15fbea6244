"""How a token is chosen from its logits.

Shapes: b rows, v vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Chance = torch.Generator | Sequence[torch.Generator | None] | None
"""Where draws come from: one source for all rows, one for each, or torch's own."""


class NotFiniteError(ValueError):
    """Logits are nan or infinite."""


class Sampling(NamedTuple):
    """How a token is chosen from its logits; see `generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0


class Chosen(NamedTuple):
    """A token of each row, and what its scores were.

    Attributes:
        tokens: the tokens, [b]
        peaks: the largest score of each row, finite if the row has neither nan nor inf, [b]
        log_probs: log-probability of each token among what could be drawn, [b]; zeros where they
            were not asked for
    """

    tokens: Tensor
    peaks: Tensor
    log_probs: Tensor


def choose(
    logits: Tensor,
    history: Tensor,
    sampling: Sampling,
    generator: Chance = None,
    *,
    banned: Sequence[int] = (),
    with_log_probs: bool = False,
) -> Chosen:
    """Choose one token per row.

    Args:
        logits: fp32 [b, v]
        history: tokens that count as repetition, [b, any]
        sampling: how to choose
        generator: source of chance; a sequence is one for each row
        banned: tokens that are never chosen
        with_log_probs: whether log-probabilities are wanted
    """
    scores = process_logits(logits, history, sampling, banned)
    peak, tokens = scores.max(-1)
    log_probs = torch.zeros_like(peak)
    if sampling.temperature > 0:
        check_finite(peak[:, None])  # a draw from nan would bring down a CUDA context
        probabilities = scores.softmax(-1)
        tokens = draw(probabilities, generator)
        if with_log_probs:
            log_probs = probabilities.gather(-1, tokens[:, None])[:, 0].log()
    elif with_log_probs:
        log_probs = peak - scores.logsumexp(-1)
    return Chosen(tokens, peak, log_probs)


def draw(probabilities: Tensor, generator: Chance = None) -> Tensor:
    """Draw one token per row [b] from probabilities [b, v].

    The tokens are those of `torch.multinomial`, which takes one generator and waits for the device.
    """
    sources = generator if isinstance(generator, Sequence) else [generator]
    waits = torch.empty_like(probabilities)  # of each token, until it is drawn: the first one is
    for rows, source in zip(waits.chunk(len(sources)), sources, strict=True):
        rows.exponential_(generator=source)
    return (probabilities / waits).argmax(-1)


def process_logits(
    logits: Tensor, history: Tensor, sampling: Sampling, banned: Sequence[int] = ()
) -> Tensor:
    """Scores [b, v] to draw from; -inf where a token must not be drawn.

    Banned tokens first; then repetition penalty, temperature, top-k, top-p, in this order: as
    Hugging Face's generation/logits_process.py.
    """
    temperature, top_k, top_p, penalty = sampling
    if banned:
        logits = logits.index_fill(-1, torch.tensor(list(banned), device=logits.device), -torch.inf)
    if penalty != 1.0:
        held = logits.gather(-1, history)
        logits = logits.scatter(-1, history, torch.where(held < 0, held * penalty, held / penalty))
    if temperature == 0.0:
        return logits
    scores = logits if temperature == 1.0 else logits / temperature
    if top_k is not None:
        kth = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if top_p is not None:
        ascending, order = scores.sort(dim=-1)
        below = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        below[:, -1] = False
        scores = scores.masked_fill(below.scatter(-1, order, below), -torch.inf)
    return scores


def check_options(max_new_tokens: int, sampling: Sampling) -> None:
    temperature, top_k, top_p, penalty = sampling
    for name, value, fits, rule in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        ("temperature", temperature, temperature >= 0, "0 (greedy) or larger"),
        ("top_k", top_k, top_k is None or _is_count(top_k), "a whole number from 1 on, or None"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "in (0, 1], or None"),
        ("repetition_penalty", penalty, penalty > 0, "larger than 0; 1 is none"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {rule}, got {value}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def check_finite(logits: Tensor) -> None:
    """The largest logit of a row [b, v] is finite, unless one is nan or inf."""
    finite = logits.amax(-1).isfinite()
    if not bool(finite.all()):
        raise NotFiniteError(
            f"logits must be finite, those of rows {(~finite).nonzero().flatten().tolist()} are "
            f"not; in float16 this model overflows, use bfloat16 or float32"
        )
