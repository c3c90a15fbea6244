"""Attention of the vision encoder through one mask, as versions of transformers have computed it.

Ours and later versions compute each window by itself. A mask over all patches gives the same
attention, added up in another order: `parity.deviations` names the versions that do it, and one
passes if it gives exactly these bits.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parity.faults._fault import Arguments, Fault, on_exit, replaced
from torchtune_qwen25vl._position_ids import frame_lengths, window_order
from torchtune_qwen25vl.model._encoder import Arrangement, arrange
from torchtune_qwen25vl.model._positional_embeddings import rotate


def _in_window_order(right: Callable) -> Callable:
    """Windows stand as they come, not those of one length side by side."""

    def wrong(grids: list[list[int]], **sizes: int) -> Arrangement:
        order, windows = window_order(grids, **sizes)
        return Arrangement(order, _one_each(windows), _one_each(frame_lengths(grids)))

    return wrong


def _one_each(lengths: list[int]) -> list[tuple[int, int]]:
    return [(1, length) for length in lengths]


def _mask(model: Any) -> None:
    for layer in model.vision.layers:
        _mask_attention(layer.attn)


def _mask_attention(attn: Any) -> None:
    def attend(arguments: Arguments, output: Tensor) -> Tensor:
        x, rotation, segments = (arguments[name] for name in ("x", "rotation", "segments"))
        q, k, v = (
            project(x).unflatten(-1, (attn.num_heads, -1))
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )  # [p, n_h, h_d]
        q, k = rotate(q, rotation), rotate(k, rotation)
        lengths = [length for count, length in segments.runs for _ in range(count)]
        mask = torch.block_diag(*(torch.ones(n, n, dtype=torch.bool) for n in lengths))
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask.to(x.device)
        )  # [n_h, p, h_d]
        return attn.output_proj(attended.transpose(0, 1).flatten(1))

    on_exit(attn, attend)


RULES: dict[str, Fault] = {
    "windows through a mask": replace(replaced(arrange, _in_window_order, "bits"), edit=_mask)
}
