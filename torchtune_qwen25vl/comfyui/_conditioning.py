"""CONDITIONING, as ComfyUI passes it between nodes.

A list of entries, each a tensor [1, l, d] and a dictionary of what else is known of it.
Shapes: l tokens, d width of the decoder.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchtune_qwen25vl.comfyui._host import output_device

POOLED, MASK, LATENTS = "pooled_output", "attention_mask", "reference_latents"

Conditioning = list[list[Any]]


class Entry(NamedTuple):
    """One entry, spelled out."""

    embeds: Tensor  # [1, l, d]
    mask: Tensor  # [1, l], 1 where there is a token
    latents: list[Tensor]  # of reference images
    others: list[str]  # names of what else it has


def make_conditioning(embeds: Tensor, mask: Tensor, latents: Sequence[Tensor] = ()) -> Conditioning:
    """Make a CONDITIONING of one entry; it has a mask where some token does not count.

    Args:
        embeds: [1, l, d]
        mask: [1, l], 1 where there is a token
        latents: of reference images
    """
    device = output_device()
    values: dict[str, Any] = {POOLED: None}
    if not bool(mask.all()):
        values[MASK] = mask.to(device)
    if latents:
        values[LATENTS] = [latent.to(device) for latent in latents]
    return [[embeds.to(device, torch.float32), values]]


def entries(conditioning: Conditioning) -> list[Entry]:
    """Return the entries of any CONDITIONING."""
    return [_entry(embeds, values) for embeds, values in conditioning]


def _entry(embeds: Tensor, values: dict[str, Any]) -> Entry:
    mask = values.get(MASK)
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
    others = [
        name for name, value in values.items() if name not in (MASK, LATENTS) and value is not None
    ]
    return Entry(embeds, mask, list(values.get(LATENTS) or ()), sorted(others))
