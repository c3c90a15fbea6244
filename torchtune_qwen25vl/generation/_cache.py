"""Keys and values that a model keeps while it generates.

Shapes: b rows, s prompt tokens, n new tokens, n_kv key-value heads, h_d head dim.
"""

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder


class Cache:
    """Keys and values of one layer, in memory set aside once.

    torchtune's `KVCache` waits for the device at every update, and attention reads its empty end.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.rows, self.first, self.size = slice(None), 0, 0
        # [b, n_kv, s + n, h_d]
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    def turn_to(self, rows: slice, first: int, size: int | None = None) -> None:
        """Restrict the cache to `rows`, starting at column `first`.

        Args:
            rows: rows of the batch that `update` writes and returns
            first: first column of these rows; the columns before it are padding, set to 0
            size: how many columns are already filled; by default those before `first`
        """
        self.rows, self.first, self.size = rows, first, first if size is None else size
        for held in (self.keys, self.values):
            held[rows, :, :first] = 0  # what is masked must be finite all the same

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, n_kv, any, h_d] and return all of them so far."""
        new = slice(self.size, self.size + keys.shape[2])
        self.keys[self.rows, :, new] = keys
        self.values[self.rows, :, new] = values
        self.size = new.stop
        held = (self.rows, slice(None), slice(self.first, self.size))
        return self.keys[held], self.values[held]


def make_caches(model: TransformerDecoder, rows: int, length: int) -> list[Cache]:
    """Make an empty cache for each layer, in the dtype and on the device of the model."""
    like = model.tok_embeddings.weight
    attns = [layer.attn for layer in model.layers]
    return [Cache((rows, attn.num_kv_heads, length, attn.head_dim), like) for attn in attns]
