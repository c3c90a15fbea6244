"""Bytes: of weights by the headers of their files, of a batch by a formula, of pixels by both.

The formula, an upper bound for one batch of b rows with t image tokens and s tokens each:

    b * s * (keys and values + activations of one decoder layer)
  + b * t * 4 patches * (pixels in and as computed + activations of one vision layer)
  + b * s * s * (mask as bool and as number)
  + b * vocabulary * logits in fp32, four times

Weights, and what other processes use, are no part of it.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import PATCHES_PER_PLACEHOLDER, PLACEHOLDER_PIXELS

LEAST_PIXELS, MOST_PIXELS = 256 * PLACEHOLDER_PIXELS, 1280 * PLACEHOLDER_PIXELS
SPARE = 0.1  # of the free memory is left alone: fragments, and what the formula does not know
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a number, its scales and the scales of those


def weights_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, four_bit: bool = False
) -> int:
    """Memory of a model's weights.

    Args:
        shapes: of the weights, by their names on disk
        dtype: in memory
        four_bit: whether the decoder's layers are NF4
    """
    return sum(
        round(prod(shape) * (NF4_BYTES if four_bit and is_quantised(name) else dtype.itemsize))
        for name, shape in shapes.items()
    )


def is_quantised(name: str) -> bool:
    """Whether a weight, by its name on disk, is one that NF4 is for."""
    *path, last = name.split(".")
    return "visual" not in path and last == "weight" and path[-1] in QUANTISED


@dataclass(frozen=True)
class Footprint:
    """What one token of a model takes while a batch is read, in bytes.

    Attributes:
        token: keys, values and activations of the decoder
        image_token: the four patches of an image token
        number: of the model's format
        logits: of one row
    """

    token: int
    image_token: int
    number: int
    logits: int

    @classmethod
    def of(cls, model: Qwen25VL, dtype: torch.dtype) -> "Footprint":
        """Of a model, on the meta device or any other."""
        n = dtype.itemsize
        first: Any = model.layers[0]
        embed, inner = model.tok_embeddings.weight.shape[1], first.mlp.w1.weight.shape[0]
        cache = 2 * len(model.layers) * first.attn.num_kv_heads * first.attn.head_dim * n
        tower: Any = model.vision
        vision = tower.layers[0].mlp.w1.weight.shape
        patch = tower.patch_embed.proj.weight.shape[1]
        return cls(
            token=cache + _layer(embed, inner, n),
            image_token=PATCHES_PER_PLACEHOLDER
            * (patch * (4 + n) + _layer(vision[1], vision[0], n)),
            number=n,
            logits=4 * 4 * model.tok_embeddings.weight.shape[0],
        )

    def batch(self, rows: int, image_tokens: int, text_tokens: int) -> int:
        """Of a batch of equal rows, by the formula."""
        length = image_tokens + text_tokens
        row = length * self.token + image_tokens * self.image_token + self.logits
        return rows * (row + length**2 * (1 + self.number))


def _layer(embed: int, inner: int, number: int) -> int:
    """One layer for one position: eight vectors of its width, two of them in fp32, three inner."""
    return (6 * embed + 3 * inner) * number + 2 * embed * 4


def pixel_budget(
    free: int, footprint: Footprint, *, text_tokens: int, min_pixels: int = LEAST_PIXELS
) -> int:
    """The largest `max_pixels` with which an image alone fits into free memory.

    A multiple of 784, from `min_pixels` to 1280 * 784; `min_pixels` where nothing fits.

    Args:
        free: bytes, with the weights already in place
        footprint: of the model
        text_tokens: of a row beside its image: prompt and answer
        min_pixels: of the image processor
    """
    least = -(-min_pixels // PLACEHOLDER_PIXELS)
    choices = range(least, max(least, MOST_PIXELS // PLACEHOLDER_PIXELS) + 1)
    budget = (1 - SPARE) * free
    fitting = bisect_right(choices, budget, key=lambda t: footprint.batch(1, t, text_tokens))
    return choices[max(fitting - 1, 0)] * PLACEHOLDER_PIXELS


def token_budget(free: int, footprint: Footprint, *, max_pixels: int, text_tokens: int) -> int:
    """The most tokens, padding and answers included, for a batch of such rows to fit.

    At least one row, whether it fits or not: batches are halved as memory runs out.

    Args:
        free: bytes, with the weights already in place
        footprint: of the model
        max_pixels: of an image
        text_tokens: of a row beside its image
    """
    image_tokens = max_pixels // PLACEHOLDER_PIXELS
    rows = int((1 - SPARE) * free) // footprint.batch(1, image_tokens, text_tokens)
    return max(rows, 1) * (image_tokens + text_tokens)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; the CPU has no exception of its own for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def release_cache(device: torch.device) -> None:
    """Give memory back that torch keeps for later, so that pieces of another size can be had."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
