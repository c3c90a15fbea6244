"""Attention within the samples of a packed row, one after the other.

A dense mask makes attention cost the square of the row. On CUDA flex attention leaves out the
blocks that no sample reaches into; elsewhere this does, by calling SDPA once for each sample.

Shapes: b batch (1), n samples, n_h heads, s tokens of the row, h_d head dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtune_qwen25vl.model import Qwen25VL


def attend_by_sample(model: Qwen25VL) -> None:
    """Let the decoder's layers take the lengths of samples, int [n], for a mask."""
    for layer in model.layers:
        layer.attn._attention_call = _by_sample(layer.attn._attention_call)


def _by_sample(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @torch.compiler.disable(recursive=False)
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
        if not isinstance(mask, Tensor) or mask.ndim != 1:
            return stock(q, k, v, mask=mask, **options)
        lengths, dropout = mask.tolist(), options["dropout_p"]
        pieces = (x.split(lengths, dim=2) for x in (q, k, v))
        outputs = [
            F.scaled_dot_product_attention(*qkv, dropout_p=dropout, is_causal=True)  # type: ignore
            for qkv in zip(*pieces, strict=True)
        ]
        return torch.cat(outputs, dim=2)  # [b, n_h, s, h_d]

    return attend
