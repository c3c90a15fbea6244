"""Faults of prompt embeddings: positions, templates, prefixes, padding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchtune.data import Message

from parity.faults import encoder
from parity.faults._fault import Fault, edited, replaced
from torchtune_qwen25vl.conditioning import PromptEncoder, prompt_sample

STAGE = "prompt embeddings"


def _changed(change: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    """Embed samples that are changed before."""

    def wrap(right: Callable) -> Callable:
        def wrong(self: Any, samples: Sequence[Any]) -> Any:
            return right(self, [change(sample) for sample in samples])

        return wrong

    return wrap


def _on_one_axis(prompt: Any) -> Any:
    index = torch.arange(len(prompt.sample["tokens"]))
    positions = index[:, None].expand(-1, 3)
    return prompt._replace(sample={**prompt.sample, "input_pos": positions})


def _one_more(prompt: Any) -> Any:
    return prompt._replace(start=prompt.start + 1)


def _default_template(right: Callable) -> Callable:
    """Ask under the system text of a chat; its header is shorter."""

    def wrong(transform: Any, prompt: str, images: Any = (), **options: Any) -> Any:
        made = right(transform, prompt, images, **options)
        content = [{"type": "image", "content": image} for image in images]
        content.append({"type": "text", "content": prompt})
        messages = [Message("system", "You are a helpful assistant."), Message("user", content)]
        sample = transform({"messages": messages}, inference=True)
        shorter = len(made.sample["tokens"]) - len(sample["tokens"])
        start, end = made.start - shorter, made.end - shorter
        return made._replace(sample=sample, start=start, end=end)

    return wrong


def _padding_kept(right: Callable) -> Callable:
    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        embeds, mask = right(self, *args, **kwargs)
        last = embeds[:, :1].expand_as(embeds)
        return torch.where(mask.bool()[..., None], embeds, last), torch.ones_like(mask)

    return wrong


FAULTS: dict[str, Fault] = {
    "prompts on one axis": replaced(PromptEncoder, _changed(_on_one_axis), STAGE, method="embed"),
    "prompts under the chat's template": replaced(prompt_sample, _default_template, STAGE),
    "prompts from one token later on": replaced(
        PromptEncoder, _changed(_one_more), STAGE, method="embed"
    ),
    "windows of images to edit not undone": edited(
        encoder.FAULTS["windows not undone"].edit, STAGE
    ),
    "padding kept behind prompts": replaced(PromptEncoder, _padding_kept, STAGE, method="__call__"),
}
