"""Conversations to the batch that a model continues."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchtune import utils
from torchtune.data import Message

from torchtune_qwen25vl.transform import Qwen25VLTransform, padded_collate


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
    utils.batch_to_device(batch, torch.device(device))
    return batch
