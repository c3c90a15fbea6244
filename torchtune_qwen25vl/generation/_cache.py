"""A model that generates: key-value caches, and attention that reads them as they lie.

Shapes: b rows, s prompt tokens, n new tokens, n_h query heads, n_kv key-value heads, h_d head dim.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchtune.modules import TransformerDecoder


class Cache:
    """Keys and values of one layer, in memory set aside once.

    Takes the place of torchtune's KVCache, of which every update waits for the device and every
    attention reads the empty end.
    """

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor) -> None:
        self.rows, self.first, self.size = slice(None), 0, 0
        # [b, n_kv, s + n, h_d]
        self.keys = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.values = torch.empty_like(self.keys)

    def turn_to(self, rows: slice, first: int, size: int | None = None) -> None:
        """Hold these rows from a column on, empty before it; up to `size`, or nothing yet."""
        self.rows, self.first, self.size = rows, first, first if size is None else size
        for held in (self.keys, self.values):
            held[rows, :, :first] = 0  # what is masked must be finite all the same

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, n_kv, any, h_d]; all so far."""
        new = slice(self.size, self.size + keys.shape[2])
        self.keys[self.rows, :, new] = keys
        self.values[self.rows, :, new] = values
        self.size = new.stop
        held = (self.rows, slice(None), slice(self.first, self.size))
        return self.keys[held], self.values[held]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float, is_causal: bool
) -> Tensor:
    """Attention of [b, n_h, any, h_d] to keys and values that heads share, [b, n_kv, any, h_d]."""
    assert not is_causal
    mask = mask[:, None]  # [b, 1, any, any]
    if q.shape[2] == 1:  # heads that share keys are queries of one head: keys are read once
        shared = q.flatten(1, 2).unflatten(1, (k.shape[1], -1))  # [b, n_kv, n_h / n_kv, h_d]
        out = F.scaled_dot_product_attention(shared, k, v, attn_mask=mask, dropout_p=dropout_p)
        return out.flatten(1, 2).unsqueeze(2)  # [b, n_h, 1, h_d]
    shares = q.device.type == "cpu"
    if not shares:  # the fused kernels of a GPU take shared heads or a mask, but not both
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=shares
    )


@contextmanager
def generating(model: TransformerDecoder, batch_size: int, length: int) -> Iterator[list[Cache]]:
    """The model in evaluation mode, with caches, returning logits only; then as it was."""
    caches = []
    changes: list[tuple[nn.Module, str, Any]] = [
        (model, "skip_output_layer", False),
        (model, "num_output_chunks", 0),
        (model, "output_hidden_states", []),
        *((module, "training", False) for module in model.modules()),
    ]
    for attn in (layer.attn for layer in model.layers):
        shape = (batch_size, attn.num_kv_heads, length, attn.head_dim)
        caches.append(cache := Cache(shape, like=model.tok_embeddings.weight))
        changes += [(attn, "kv_cache", cache), (attn, "cache_enabled", True)]
        # torchtune would copy the whole cache for every head that shares it, at every token
        changes += [(attn, "num_kv_heads", attn.num_heads), (attn, "_attention_call", _attend)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for change in changes:
            _replace(*change)
        # inference mode is faster, but what a sharded model gathers in it could not train again
        with torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode():
            yield caches
    finally:
        for change in before:
            _replace(*change)


def _replace(owner: nn.Module, name: str, value: Any) -> None:
    delattr(owner, name)  # a module is only exchanged for a module otherwise
    setattr(owner, name, value)
