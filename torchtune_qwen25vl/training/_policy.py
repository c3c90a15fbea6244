"""Losses of groups of answers that the policy gave itself, each with a reward.

What an answer is worth is its advantage: its reward less the mean of its group, the answers to one
prompt. A token's ratio is its probability now over that under which it was drawn; a step beyond
the clipped range is not rewarded further.

    grpo     the mean over an answer's tokens, then over answers
    dr_grpo  the sum over an answer's tokens over `max_new_tokens`, then the mean over answers
    dapo     the mean over all tokens of the step
    gspo     as grpo, with one ratio for all tokens of an answer: that of its mean log-ratio

Shapes: a answers, t tokens of the longest, g answers of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.training._kinds import (
    AMOUNT,
    POSITIVE,
    Kind,
    check_kinds,
    or_null,
    read_options,
    word_of,
)

PolicyName = Literal["grpo", "dr_grpo", "dapo", "gspo"]
Scale = Literal["group", "batch", "none"]
EPSILON = 1e-4  # beside a standard deviation
LOSS = {
    "loss.name": word_of(PolicyName),
    "loss.clip_low": Kind("between 0 and 1", lambda value: AMOUNT.holds(value) and 0 < value < 1),
    "loss.clip_high": or_null(POSITIVE),
    "loss.beta": AMOUNT,
    "loss.scale_rewards": word_of(Scale),
}


@dataclass(frozen=True)
class PolicyLoss:
    """How the loss of an answer is made.

    Attributes:
        name: see above
        clip_low: how far below 1 a ratio counts
        clip_high: how far above 1; null: as far as below
        beta: weight of the divergence from the reference; 0: there is none
        scale_rewards: advantages are divided by the standard deviation of their group, of all
            rewards of the step, or by nothing

    Sources: GRPO https://arxiv.org/abs/2402.03300, Dr. GRPO https://arxiv.org/abs/2503.20783, DAPO
    https://arxiv.org/abs/2503.14476, GSPO https://arxiv.org/abs/2507.18071.
    """

    name: PolicyName = "grpo"
    clip_low: float = 0.2
    clip_high: float | None = None
    beta: float = 0.0
    scale_rewards: Scale = "group"

    def __post_init__(self) -> None:
        check_kinds({"loss": vars(self)}, LOSS)

    @property
    def high(self) -> float:
        """How far above 1 a ratio counts."""
        return self.clip_low if self.clip_high is None else self.clip_high


def read_policy_loss(section: Mapping[str, Any]) -> PolicyLoss:
    """Read the loss of a YAML, `{"name": "grpo", "clip_low": 0.2}`.

    Raises:
        ValueError: if there is no such loss or option, or not with this value.
    """
    return read_options(PolicyLoss, "loss", section)


def advantages(rewards: Tensor, scale: Scale, device: torch.device) -> Tensor:
    """Compute what each answer is worth beside the others of its group, [groups, g].

    Args:
        rewards: reward of each answer, [groups, g]
        scale: what they are divided by
        device: device of the ranks, which share the standard deviation of a step
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (rewards.std(1, keepdim=True) + EPSILON)
    total, squares, count = _ranks.sums(
        [float(rewards.sum()), float(rewards.square().sum()), rewards.numel()], device
    )
    variance = max(0.0, squares - total**2 / count) / max(count - 1, 1)
    return centred / (variance**0.5 + EPSILON)


def can_teach(rewards: Tensor, device: torch.device) -> bool:
    """Say whether answers give any rank gradients: not if the rewards of each group are alike.

    Args:
        rewards: reward of each answer, [groups, g]
        device: device of the ranks
    """
    return bool(_ranks.largest(int((rewards != rewards[:, :1]).any()), device))


@dataclass(frozen=True)
class Drawn:
    """What a loss knows of answers; beyond an answer's own tokens all is zero.

    Attributes:
        policy: log-probability of each token now, [a, t]
        before: log-probability of each token when the answers were drawn, without gradients
        reference: log-probability of each token by the reference; None without one
        lengths: number of tokens of each answer, [a]
        advantages: what each answer is worth, [a]
    """

    policy: Tensor
    before: Tensor
    reference: Tensor | None
    lengths: Tensor
    advantages: Tensor

    @property
    def is_token(self) -> Tensor:
        """Which places hold a token, bool [a, t]."""
        places = torch.arange(self.policy.shape[1], device=self.policy.device)
        return places < self.lengths[:, None]


def answer_losses(
    drawn: Drawn, loss: PolicyLoss, max_new_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each answer, [a]; for dapo its sum over tokens.

    Args:
        drawn: the answers
        loss: how it is made
        max_new_tokens: what dr_grpo divides by

    Returns:
        losses, and sums over tokens of figures for the log
    """
    is_token = drawn.is_token
    lengths = drawn.lengths.clamp(min=1)
    log_ratio = torch.where(is_token, drawn.policy - drawn.before, 0)
    if loss.name == "gspo":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    worth = drawn.advantages[:, None]
    kept = ratio.clamp(1 - loss.clip_low, 1 + loss.high)
    gain = torch.minimum(ratio * worth, kept * worth)
    clipped = (ratio * worth > kept * worth) & is_token
    losses, figures = -gain, {"clipped": clipped.sum()}
    if drawn.reference is not None:
        apart = torch.where(is_token, drawn.reference - drawn.policy, 0)
        divergence = apart.exp() - apart - 1  # never negative, its mean is that of KL
        losses = losses + loss.beta * divergence
        figures["kl"] = (divergence.detach() * is_token).sum()
    total = torch.where(is_token, losses, 0).sum(1)  # [a]
    if loss.name == "dr_grpo":
        return total / max_new_tokens, figures
    return (total if loss.name == "dapo" else total / lengths), figures
