"""Faults of packing and decoding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parity.faults._fault import Fault, patched
from torchtune_qwen25vl.generation import _generate
from torchtune_qwen25vl.transform import _collate


def _cache_index(right: Callable) -> Callable:
    def wrong(model: Any, tokens: Tensor, positions: Tensor, attended: Any, caches: Any) -> Tensor:
        index = torch.full_like(positions, caches[0].size)
        return right(model, tokens, index, attended, caches)

    return wrong


def _attend_padding(right: Callable) -> Callable:
    def wrong(model: Any, tokens: Tensor, positions: Tensor, attended: Any, caches: Any) -> Tensor:
        return right(model, tokens, positions, None, caches)

    return wrong


def _one_block(right: Callable) -> Callable:
    return lambda lengths: right([sum(lengths)])


def _running_positions(right: Callable) -> Callable:
    def wrong(batch: Sequence[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        packed = right(batch, *args, **kwargs)
        index = torch.arange(packed["tokens"].shape[1])
        packed["input_pos"] = index.view(1, -1, 1).expand(1, -1, 3)
        return packed

    return wrong


FAULTS: dict[str, Fault] = {
    "decoding from the cache index": patched(
        _generate, "decode_one_token", _cache_index, "greedy tokens"
    ),
    "padding attended to while decoding": patched(
        _generate, "decode_one_token", _attend_padding, "greedy tokens"
    ),
    "packed samples see each other": patched(_collate, "_block_causal_mask", _one_block, "packed"),
    "packed positions run on": patched(_collate, "packed_collate", _running_positions, "packed"),
}
