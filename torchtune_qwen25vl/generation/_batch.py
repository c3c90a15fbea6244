"""Conversations to the batch that a model continues.

Shapes: b rows, s tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtune.data import Message
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.transform import Qwen25VLTransform, batch_to_device, padded_collate


def inference_batch(
    conversations: Sequence[Sequence[Message]],
    transform: Qwen25VLTransform,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Make a left-padded batch of conversations that each wait for an answer.

    Args:
        conversations: messages of each row; the last ones are the user's
        transform: messages to samples
        device: device of the model

    Raises:
        ValueError: if a message cannot be read, or a conversation is too long.
    """
    samples = [transform({"messages": messages}, inference=True) for messages in conversations]
    return prompt_batch(samples, transform.pad_id, device=device)


def prompt_batch(
    samples: Sequence[Mapping[str, Any]], pad_id: int, *, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Make a left-padded batch of samples that the transform made for inference.

    Args:
        samples: what `Qwen25VLTransform` returns with `inference=True`
        pad_id: token at padding, `transform.pad_id`
        device: device of the model
    """
    batch = padded_collate(samples, pad_id, padding_side="left")
    batch_to_device(batch, torch.device(device))
    return batch


def real_tokens(batch: Mapping[str, Any]) -> Tensor:
    """Return which tokens of a left-padded batch are no padding, bool [b, s]."""
    mask = batch.get("mask")
    return torch.ones_like(batch["tokens"], dtype=torch.bool) if mask is None else mask[:, -1]


def check_prompt(model: TransformerDecoder, batch: Mapping[str, Any]) -> None:
    """Refuse padding that the mask does not show, or on the right.

    Padding has position 0 on all axes, as has the first text of a prompt, and no other text; the
    placeholders of several frame groups may all have it.
    """
    positions = batch["input_pos"]
    if positions.shape != (*batch["tokens"].shape, 3):
        raise ValueError(
            f"generation needs positions on three axes, input_pos [b, s, 3], got "
            f"{list(positions.shape)} for tokens {list(batch['tokens'].shape)}"
        )
    real = real_tokens(batch)
    text_at_zero = (positions == 0).all(-1) & real & ~model.placeholders(batch["tokens"])
    padded = (text_at_zero.sum(-1) > 1) | ~real[:, -1]  # [b]
    if bool(padded.any()):
        raise ValueError(
            f"prompts must be padded on the left and come with a mask, but rows "
            f"{padded.nonzero().flatten().tolist()} are not; "
            f'collate with padding_side="left"'
        )
