"""Keys and values that a model keeps while it generates.

Shapes: b rows, s prompt tokens, n new tokens, n_kv key-value heads, h_d head dim.
"""

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.model import product_dtype


class Cache:
    """Keys and values of one layer, in memory set aside once.

    torchtune's `KVCache` waits for the device at every update, and attention reads its empty end.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.size = 0  # columns that are filled
        # [b, n_kv, s + n, h_d]
        self.keys = torch.empty(shape, dtype=product_dtype(like), device=like.device)
        self.values = torch.empty_like(self.keys)

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, n_kv, any, h_d] and return all of them so far."""
        new = slice(self.size, self.size + keys.shape[2])
        self.keys[:, :, new] = keys
        self.values[:, :, new] = values
        self.size = new.stop
        return self.keys[:, :, : self.size], self.values[:, :, : self.size]


def make_caches(model: TransformerDecoder, rows: int, length: int) -> list[Cache]:
    """Make an empty cache for each layer, in the dtype of products and on the model's device."""
    like = model.norm.scale
    attns = [layer.attn for layer in model.layers]
    return [Cache((rows, attn.num_kv_heads, length, attn.head_dim), like) for attn in attns]
