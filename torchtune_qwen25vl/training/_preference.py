"""Losses of preference, each a function of the log-probabilities of a row's answers.

A row of most losses is a pair: a chosen and a rejected answer. A row of `kto` is one answer that
was liked or not, and beside it another row's answer to the same prompt, moved there to see how far
the policy is from the reference where nobody judged.

Log-probabilities are sums over the labelled tokens of an answer. "Per token" below is such a sum
over the number of its tokens; a ratio is that of the policy less that of the reference.

Shapes: r rows; column 0 is the chosen (or own) answer, column 1 the rejected (or moved) one.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

FROM_REFERENCE = ("dpo", "ipo", "hinge", "kto", "mpo")  # the other losses know no reference


@dataclass(frozen=True)
class Answers:
    """What a loss knows of the answers of some rows.

    Attributes:
        policy: log-probability of each answer, [r, 2]
        reference: the same of the reference, [r, 2], None for losses without one
        lengths: labelled tokens of each answer, [r, 2]
        liked: whether the own answer was liked, bool [r], for kto
    """

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    liked: Tensor

    @property
    def ratios(self) -> Tensor:
        """Log-ratio of policy to reference, [r, 2]."""
        assert self.reference is not None
        return self.policy - self.reference

    @property
    def per_token(self) -> Tensor:
        """Mean log-probability of a token of each answer, [r, 2]."""
        return self.policy / self.lengths

    @property
    def ratios_per_token(self) -> Tensor:
        """Mean log-ratio of a token of each answer, [r, 2]."""
        return self.ratios / self.lengths

    def __getitem__(self, rows: Tensor) -> "Answers":
        """Select rows by a mask, bool [r]."""
        fields = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return replace(self, **fields)


Loss = Callable[[Answers], Tensor]  # [r]


def dpo(answers: Answers, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Compute the loss of direct preference optimisation, [r].

    `label_smoothing` is the share of pairs that are held to be the wrong way round.

    Source: https://arxiv.org/abs/2305.18290; smoothing: https://ericmitchell.ai/cdpo.pdf
    """
    margin = beta * _margin(answers.ratios)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def ipo(answers: Answers, *, beta: float = 0.1) -> Tensor:
    """Compute the squared distance of the margin per token to `1 / (2 * beta)`, [r].

    Source: https://arxiv.org/abs/2310.12036
    """
    return (_margin(answers.ratios_per_token) - 1 / (2 * beta)).square()


def hinge(answers: Answers, *, beta: float = 0.1) -> Tensor:
    """Compute how much the margin falls short of 1, [r].

    Source: https://arxiv.org/abs/2309.06657
    """
    return relu(1 - beta * _margin(answers.ratios))


def simpo(answers: Answers, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Compute the loss of a margin per token that is to exceed `gamma`, without reference, [r].

    Source: https://arxiv.org/abs/2405.14734
    """
    return -logsigmoid(beta * _margin(answers.per_token) - gamma)


def orpo(answers: Answers, *, beta: float = 0.1) -> Tensor:
    """Compute the chosen answer's loss per token and `beta` times that of the odds ratio, [r].

    Source: https://arxiv.org/abs/2403.07691
    """
    mean = answers.per_token
    odds = _margin(mean - torch.log1p(-mean.exp()))
    return -mean[:, 0] - beta * logsigmoid(odds)


def kto(
    answers: Answers,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute the loss of answers that were liked or not, [r].

    A ratio is held against the divergence, which is the mean ratio of all moved answers, at least
    0, and has no gradient.

    Source: https://arxiv.org/abs/2402.01306
    """
    moved = answers.ratios[answers.lengths[:, 1] > 0, 1].detach()
    divergence = (moved.sum() / max(len(moved), 1)).clamp(min=0)
    gain = beta * (answers.ratios[:, 0] - divergence)
    value = torch.where(answers.liked, gain, -gain).sigmoid()
    weight = torch.where(answers.liked, desirable_weight, undesirable_weight)
    return weight * (1 - value)


def mpo(
    answers: Answers,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    preference_weight: float = 0.8,
    quality_weight: float = 0.2,
    sft_weight: float = 1.0,
) -> Tensor:
    """Compute a weighted sum: `dpo`, the quality of each answer alone, the chosen one's loss, [r].

    Quality is that of binary classifier optimisation, whose moving shift of rewards is 0 here, so
    that a row's loss depends on the row alone.

    Source: https://arxiv.org/abs/2411.10442
    """
    rewards = beta * answers.ratios
    quality = -logsigmoid(rewards[:, 0]) - logsigmoid(-rewards[:, 1])
    preference = dpo(answers, beta=beta, label_smoothing=label_smoothing)
    sft = -answers.per_token[:, 0]
    return preference_weight * preference + quality_weight * quality + sft_weight * sft


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "orpo": orpo,
    "kto": kto,
    "mpo": mpo,
}


def read_loss(section: Mapping[str, Any]) -> Loss:
    """Read a loss with its options, `{"name": "dpo", "beta": 0.1}`.

    Raises:
        ValueError: if there is no such loss, or it has no such option or not with this value.
    """
    options = {str(key): value for key, value in section.items()}
    name = options.pop("name", None)
    if name not in LOSSES:
        raise ValueError(f"loss.name is one of {list(LOSSES)}, got loss.name={name!r}")
    known = list(inspect.signature(LOSSES[name]).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"loss {name} has no keys {unknown}; it takes {known}")
    for key, value in options.items():
        _check_option(key, value)
    return partial(LOSSES[name], **options)


def rewards(answers: Answers, beta: float) -> Tensor:
    """Compute what the loss takes for the reward of each answer, [r, 2].

    That is `beta` times the log-ratio, or for a loss without reference the log-probability of a
    token.
    """
    return beta * (answers.per_token if answers.reference is None else answers.ratios).detach()


def _check_option(key: str, value: Any) -> None:
    is_number = type(value) in (int, float)
    if key == "label_smoothing":
        holds, rule = is_number and 0 <= value < 0.5, "a number from 0 to below 0.5"
    elif key == "beta":
        holds, rule = is_number and 0 < value < float("inf"), "a number of more than 0"
    else:
        holds, rule = is_number and 0 <= value < float("inf"), "a number from 0"
    if not holds:
        raise ValueError(f"loss.{key} is {rule}, got loss.{key}={value!r}")


def _margin(values: Tensor) -> Tensor:
    return values[:, 0] - values[:, 1]  # [r]
