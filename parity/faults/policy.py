"""Faults of policy: what the sampler sees, and what an answer is held against."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl.model import linear_log_probs
from torchtune_qwen25vl.training import Sampler, advantages
from torchtune_qwen25vl.training._policy import answer_losses


def _one_axis(right: Callable) -> Callable:
    def wrong(self: Sampler, model: Any, prompts: Sequence[dict], numbers: Any) -> Any:
        counted = [
            {**prompt, "input_pos": torch.arange(len(prompt["tokens"]))[:, None].expand(-1, 3)}
            for prompt in prompts
        ]
        return right(self, model, counted, numbers)

    return wrong


def _not_centred(right: Callable) -> Callable:
    def wrong(rewards: Tensor, *args: Any) -> Tensor:
        return rewards / (rewards.std(1, keepdim=True) + 1e-4)

    return wrong


def _padding_counted(right: Callable) -> Callable:
    def wrong(drawn: Any, *args: Any) -> Any:
        whole = torch.full_like(drawn.lengths, drawn.policy.shape[1])
        return right(dataclasses.replace(drawn, lengths=whole), *args)

    return wrong


def _without(*names: str) -> Callable[[Callable], Callable]:
    def wrap(right: Callable) -> Callable:
        def wrong(*args: Any, **options: Any) -> Tensor:
            return right(*args, **{k: v for k, v in options.items() if k not in names})

        return wrong

    return wrap


FAULTS: dict[str, Fault] = {
    "sampler's positions on one axis": replaced(Sampler, _one_axis, "policy", method="__call__"),
    "advantages not centred in a group": replaced(advantages, _not_centred, "policy"),
    "padding counted": replaced(answer_losses, _padding_counted, "policy"),
    "placeholders not banned in the trainer": replaced(
        linear_log_probs, _without("banned"), "policy"
    ),
    "temperature of the sampler alone": replaced(
        linear_log_probs, _without("temperature"), "policy"
    ),
}
