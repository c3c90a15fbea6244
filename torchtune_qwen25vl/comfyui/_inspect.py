"""The node that says what a conditioning is, and how far it is from another.

Shapes: l tokens, d width of the decoder.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_qwen25vl.comfyui._conditioning import Conditioning, Entry, entries
from torchtune_qwen25vl.comfyui._loader import CATEGORY


class InspectConditioning:
    """Say shape, mask and norms of a conditioning, and its difference from another."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    FUNCTION = "inspect"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        other = "Another one, from which the first is said to differ."
        return {
            "required": {"conditioning": ("CONDITIONING",)},
            "optional": {"other": ("CONDITIONING", {"tooltip": other})},
        }

    def inspect(
        self, conditioning: Conditioning, other: Conditioning | None = None
    ) -> dict[str, Any]:
        """Say it, on the node and as text for other nodes."""
        found = entries(conditioning)
        lines = [line for number, entry in enumerate(found, 1) for line in _told(entry, number)]
        if other is not None:
            lines += _difference(found, entries(other))
        text = "\n".join(lines)
        return {"ui": {"text": [text]}, "result": (text,)}


def _told(entry: Entry, number: int) -> list[str]:
    embeds, counted = entry.embeds.float(), entry.mask.bool()
    norms = embeds[counted].norm(dim=-1)  # [tokens that count]
    lines = [
        f"{number}: {_kind(entry.embeds)}, {int(counted.sum())} of {counted.numel()} tokens count",
        f"   norms of tokens: {norms.min():.4g} to {norms.max():.4g}, mean {norms.mean():.4g}",
    ]
    if wrong := int((~embeds.isfinite()).sum()):
        lines.append(f"   {wrong} values are nan or infinite")
    if entry.latents:
        lines.append(f"   reference latents: {', '.join(map(_kind, entry.latents))}")
    if entry.others:
        lines.append(f"   also has {', '.join(entry.others)}")
    return lines


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _difference(ours: list[Entry], others: list[Entry]) -> list[str]:
    shapes = [[list(entry.embeds.shape) for entry in found] for found in (ours, others)]
    if shapes[0] != shapes[1]:
        return [f"difference: of shape, {shapes[0]} and {shapes[1]}"]
    lines = []
    for number, (one, other) in enumerate(zip(ours, others, strict=True), 1):
        a, b = one.embeds.float(), other.embeds.float().to(one.embeds.device)
        largest = (a - b).abs().max()
        cosines = F.cosine_similarity(a, b, dim=-1)  # [1, l]
        lines.append(
            f"difference of {number}: largest {largest:.4g}, {largest / b.abs().max():.4g} of the "
            f"largest value; least cosine of a token {cosines.min():.6f}"
        )
        if not torch.equal(one.mask, other.mask.to(one.mask.device)):
            lines.append("   their masks differ")
        if _latents_differ(one.latents, other.latents):
            lines.append("   their reference latents differ")
    return lines


def _latents_differ(ours: list[Tensor], others: list[Tensor]) -> bool:
    return len(ours) != len(others) or any(
        not torch.equal(a, b.to(a.device)) for a, b in zip(ours, others, strict=True)
    )
