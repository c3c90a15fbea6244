"""Memory: of weights by the headers of their files, of a batch by a formula.

The formula is an upper bound for one batch of b rows with t image tokens and s tokens each:

    b * s * (keys and values + activations of one decoder layer)
  + b * t * 4 patches * (pixels in and as computed + activations of one vision layer)
  + b * s * s * (mask as bool and as number)
  + b * vocabulary * logits in fp32, four times

It leaves out the weights, and what other processes use. Rows that come and go take no more than
such a batch: their caches are as large, and fewer prompts are read at a time.
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
FOUR_BIT_BYTES = {  # of a number
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),  # its scales and the scales of those
    "int4": 0.5 + 2 * 2 / 64,  # scale and zero point of its group
}


def weights_bytes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, four_bit: str | None = None
) -> int:
    """Count the bytes of a model's weights in memory.

    Args:
        shapes: shape of each weight, by its name on disk
        dtype: dtype of the weights in memory
        four_bit: format of the decoder's layers; None for `dtype`
    """
    quantised = dtype.itemsize if four_bit is None else FOUR_BIT_BYTES[four_bit]
    return sum(
        round(prod(shape) * (quantised if is_quantised(name) else dtype.itemsize))
        for name, shape in shapes.items()
    )


def is_quantised(name: str) -> bool:
    """Say whether 4-bit loading quantises a weight, by its name on disk."""
    *path, last = name.split(".")
    return "visual" not in path and last == "weight" and path[-1] in QUANTISED


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes while a batch is read.

    Attributes:
        token: keys, values and activations of the decoder for one token
        image_token: pixels and activations of the encoder for the four patches of one placeholder
        bytes_per_value: size of one number in the model's dtype
        logits: logits of one row
    """

    token: int
    image_token: int
    bytes_per_value: int
    logits: int

    @classmethod
    def of(cls, model: Qwen25VL, dtype: torch.dtype) -> "Footprint":
        """Measure a model, on the meta device or any other."""
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
            bytes_per_value=n,
            logits=4 * 4 * model.tok_embeddings.weight.shape[0],
        )

    def batch(self, rows: int, image_tokens: int, text_tokens: int) -> int:
        """Return the bytes of a batch of equal rows, by the formula."""
        length = image_tokens + text_tokens
        row = length * self.token + image_tokens * self.image_token + self.logits
        return rows * (row + length**2 * (1 + self.bytes_per_value))


def _layer(embed: int, inner: int, bytes_per_value: int) -> int:
    """Return the bytes of one layer for one position.

    They are eight vectors of the layer's width, two of them in fp32, and three of the MLP's.
    """
    return (6 * embed + 3 * inner) * bytes_per_value + 2 * embed * 4


def pixel_budget(
    free: int, footprint: Footprint, *, text_tokens: int, min_pixels: int = LEAST_PIXELS
) -> int:
    """Return the largest `max_pixels` with which an image alone fits into free memory.

    It is a multiple of 784 from `min_pixels` to 1280 * 784, and `min_pixels` if nothing fits.

    Args:
        free: bytes that are free once the weights are loaded
        footprint: bytes that the model takes
        text_tokens: tokens of a row's prompt and answer, without its image
        min_pixels: fewest pixels of an image
    """
    least = -(-min_pixels // PLACEHOLDER_PIXELS)
    choices = range(least, max(least, MOST_PIXELS // PLACEHOLDER_PIXELS) + 1)
    budget = (1 - SPARE) * free
    fitting = bisect_right(choices, budget, key=lambda t: footprint.batch(1, t, text_tokens))
    return choices[max(fitting - 1, 0)] * PLACEHOLDER_PIXELS


def token_budget(free: int, footprint: Footprint, *, max_pixels: int, text_tokens: int) -> int:
    """Return how many tokens of such rows fit into memory, padding and answers included.

    It is at least one row, whether that fits or not: batches are halved when memory runs out.

    Args:
        free: bytes that are free once the weights are loaded
        footprint: bytes that the model takes
        max_pixels: most pixels of an image
        text_tokens: tokens of a row's prompt and answer, without its image
    """
    image_tokens = max_pixels // PLACEHOLDER_PIXELS
    rows = int((1 - SPARE) * free) // footprint.batch(1, image_tokens, text_tokens)
    return max(rows, 1) * (image_tokens + text_tokens)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether torch ran out of memory, for which the CPU has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def release_cache(device: torch.device) -> None:
    """Give back the memory that torch keeps for later, so that pieces of another size fit."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
