"""The decoder's attention: rotation, mask and cache are arguments.

Shapes: b rows, s tokens, n samples of a packed row, n_h query heads, n_kv key-value heads, h_d head
dim.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torchtune.modules import MultiHeadAttention

from torchtune_qwen25vl.model._positional_embeddings import rotate
from torchtune_qwen25vl.model._segments import Segments, attend_within, cut, repeated, runs_of


class KeyValues(Protocol):
    """The keys and values of one layer so far; torchtune's `KVCache` is one too."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [b, n_kv, s, h_d] and return all of them."""


def prepare(mask: Any, h: Tensor) -> Any:
    """Make of a mask what all layers can use as it is.

    Args:
        mask: True where a token (row) may attend, bool [b, s, any]; a BlockMask of flex attention;
            or the lengths of the samples of one packed row, int [n], none of which sees another
        h: hidden states [b, s, d], in the dtype and on the device of the layers

    Returns:
        what is added to the scores, [b, 1, s, any]; `Segments`; or the BlockMask
    """
    if not isinstance(mask, Tensor):
        return mask
    if mask.ndim == 1:
        return cut(runs_of(mask.tolist()), h[0])
    return torch.zeros_like(mask, dtype=h.dtype).masked_fill_(~mask, -torch.inf)[:, None]


class DecoderAttention(MultiHeadAttention):
    """Causal attention whose heads share keys and values in groups.

    It is a `MultiHeadAttention` so that torchtune's tensor-parallel set-up finds its heads.
    """

    def forward(
        self, x: Tensor, *, rotation: Tensor, mask: Any = None, cache: KeyValues | None = None
    ) -> Tensor:
        """Attend, [b, s, d] -> [b, s, d].

        Args:
            x: hidden states [b, s, d]
            rotation: rotation of every token, [b or 1, s, 2, h_d]
            mask: what `prepare` makes of one. Without it, tokens see what stands before them in
                `x`, and a single token sees the whole cache.
            cache: keys and values so far, appended to; by default those of `setup_caches`
        """
        q, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rotation), rotate(k, rotation)  # [b, s, n_h or n_kv, h_d]
        dropout_p = self.attn_dropout if self.training else 0.0
        if isinstance(mask, Segments):
            heads = (q[0], k[0], v[0])  # [s, n_h or n_kv, h_d]
            out = attend_within(*heads, mask, is_causal=True, dropout_p=dropout_p)
            return self.output_proj(out.flatten(1)[None])
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [b, n_h or n_kv, s, h_d]
        if cache is None and self.cache_enabled:
            cache = self.kv_cache
        if cache is not None:
            k, v = cache.update(k, v)
        if not (mask is None or isinstance(mask, Tensor)):
            k, v = repeated(q, k, v, dim=1)
            out = self._attention_call(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=False)
        elif q.shape[2] == 1:
            out = _attend_from_one(q, k, v, mask, dropout_p)
        else:
            out = _attend(q, k, v, mask, dropout_p, self.is_causal)
        return self.output_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [b, s, n_h or n_kv, h_d]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """Attend under a mask, or causally without one, [b, n_h, s, h_d]."""
    if mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=True
        )
    shares = q.device.type == "cpu"  # fused kernels of a GPU take shared heads or a mask, not both
    if not shares:
        k, v = repeated(q, k, v, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=shares
    )


def _attend_from_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """Attend from one token, [b, n_h, 1, h_d].

    Heads that share keys become queries of one head, so that the keys are read once.
    """
    queries = q.flatten(1, 2).unflatten(1, (k.shape[1], -1))  # [b, n_kv, n_h / n_kv, h_d]
    out = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, dropout_p=dropout_p)
    return out.flatten(1, 2).unsqueeze(2)
