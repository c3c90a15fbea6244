"""Attention within segments of one long row, none of which sees another.

The encoder's windows and frames are segments, and so are the samples of a packed row. On a GPU all
segments go through one kernel; where there is none, runs of segments of equal length do together.

Shapes: n tokens or patches, n_h query heads, n_kv key-value heads, h_d head dim.
"""

import inspect
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchtune_qwen25vl.model._autocast import product_dtype

VARLEN = "torch.nn.attention.varlen"  # from torch 2.10 on
varlen_attn: Any = import_module(VARLEN).varlen_attn if find_spec(VARLEN) else None

Runs = Sequence[tuple[int, int]]  # segments of equal length in a row: how many, tokens in each


class Segments(NamedTuple):
    """How a row is cut.

    Attributes:
        runs: segments from first to last
        offsets: where each begins, and the end, int32 [segments + 1] on the device of the row; None
            where attention goes run by run
    """

    runs: Runs
    offsets: Tensor | None


def runs_of(lengths: Iterable[int]) -> Runs:
    """Count segments of equal length that stand side by side."""
    return [(len(list(run)), length) for length, run in groupby(lengths)]


def cut(runs: Runs, row: Tensor) -> Segments:
    """Cut a row [n, ...] into segments, ready for its device."""
    if not _has_kernel(row):
        return Segments(runs, None)
    lengths = [length for count, length in runs for _ in range(count)]
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Segments(runs, offsets.to(row.device, non_blocking=True))


def has_segment_kernel() -> bool:
    """Say whether torch has one kernel for all segments of a row, in bf16 and on a GPU."""
    return varlen_attn is not None


def _has_kernel(row: Tensor) -> bool:
    halves = product_dtype(row) in (torch.bfloat16, torch.float16)
    return has_segment_kernel() and row.is_cuda and halves


@torch.compiler.disable
def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend within each segment, [n, n_h, h_d].

    Args:
        q: queries [n, n_h, h_d]
        k: keys [n, n_kv, h_d]
        v: values [n, n_kv, h_d]
        segments: how the row is cut
        is_causal: whether a token sees only what stands before it
        dropout_p: probability of dropping an attention weight
    """
    if segments.offsets is not None and dropout_p == 0.0:
        return _in_one_kernel(q, k, v, segments.offsets, segments.runs, is_causal)
    sizes = [count * length for count, length in segments.runs]
    pieces = zip(segments.runs, *(x.split(sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for run, *qkv in pieces:
        # [count, n_h or n_kv, length, h_d]
        queries, keys, values = (x.unflatten(0, run).transpose(1, 2) for x in qkv)
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            dropout_p=dropout_p,
            is_causal=is_causal,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # [count * length, n_h, h_d]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _in_one_kernel(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, runs: Runs, is_causal: bool
) -> Tensor:
    """Call `varlen_attn`, which asks for causality and shared heads in each release's own way."""
    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if is_causal:
        options = {"is_causal": True} if "is_causal" in takes else {"window_size": (-1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            k, v = repeated(q, k, v, dim=1)
    longest = max(length for _, length in runs)
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)


def repeated(q: Tensor, k: Tensor, v: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """Copy keys and values to every query head that shares them; heads are dimension `dim`."""
    shared = q.shape[dim] // k.shape[dim]
    return k.repeat_interleave(shared, dim=dim), v.repeat_interleave(shared, dim=dim)
