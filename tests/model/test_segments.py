"""Attention within segments: run by run, and how the kernel of a GPU is asked in each release."""

import pytest
import torch
from torch.nn import functional as F

from torchtune_qwen25vl.model import _segments
from torchtune_qwen25vl.model._segments import Segments, attend_within, cut, runs_of

LENGTHS = (4, 4, 1, 6, 2, 2)


def heads(count, seed):
    return torch.randn(sum(LENGTHS), count, 8, generator=torch.Generator().manual_seed(seed))


def plain(q, k, v, is_causal, lengths=LENGTHS):
    """One segment after another, every query head with its own copy of the keys."""
    shared = q.shape[1] // k.shape[1]
    outputs = []
    for q_, k_, v_ in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        k_, v_ = (x.repeat_interleave(shared, dim=1) for x in (k_, v_))
        scores = torch.einsum("qhd,khd->hqk", q_, k_) / 8**0.5
        if is_causal:
            scores = scores.masked_fill(~torch.ones_like(scores[0]).tril().bool(), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
    return torch.cat(outputs)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_equals_plain_arithmetic(kv_heads, is_causal):
    q, k, v = heads(6, 0), heads(kv_heads, 1), heads(kv_heads, 2)
    out = attend_within(q, k, v, cut(runs_of(LENGTHS), q), is_causal=is_causal)
    assert (out - plain(q, k, v, is_causal)).abs().max() < 1e-6
    wrong = plain(q, k, v, is_causal, lengths=LENGTHS[::-1])
    assert (out - wrong).abs().max() > 1e-2


def test_runs_and_offsets():
    assert runs_of(LENGTHS) == [(2, 4), (1, 1), (1, 6), (2, 2)]
    assert cut(runs_of(LENGTHS), heads(2, 0)).offsets is None  # a CPU has no such kernel


def varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
    return asked(q, k, v, cu_q, cu_k, max_q, max_k, is_causal)


def varlen_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
    return asked(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))


def varlen_2_12(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return asked(q, k, v, cu_q, cu_k, max_q, max_k, window_size == (-1, 0))


def asked(q, k, v, cu_q, cu_k, max_q, max_k, is_causal):
    """What the kernel computes of its arguments, where keys have as many heads as queries."""
    assert q.shape == k.shape == v.shape
    assert torch.equal(cu_q, cu_k)
    assert cu_q.dtype == torch.int32
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    return plain(q, k, v, is_causal, lengths)


@pytest.mark.parametrize("release", [varlen_2_10, varlen_2_11, varlen_2_12])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_the_kernel_is_asked_in_the_releases_own_way(kv_heads, is_causal, release, monkeypatch):
    monkeypatch.setattr(_segments, "varlen_attn", release)
    monkeypatch.setattr(_segments, "_has_kernel", lambda row: True)
    q, k, v = heads(6, 0), heads(kv_heads, 1), heads(kv_heads, 2)
    segments = cut(runs_of(LENGTHS), q)
    assert segments.offsets.tolist() == [0, 4, 8, 9, 15, 17, 19]
    out = attend_within(q, k, v, segments, is_causal=is_causal)
    assert (out - plain(q, k, v, is_causal)).abs().max() < 1e-6
    assert (out - plain(q, k, v, not is_causal)).abs().max() > 1e-2


def test_dropout_goes_run_by_run(monkeypatch):
    """The kernel has none."""
    monkeypatch.setattr(_segments, "varlen_attn", None)  # would fail if it were called
    offsets = torch.tensor([0, 4, 8, 9, 15, 17, 19], dtype=torch.int32)
    q, k, v = heads(2, 0), heads(2, 1), heads(2, 2)
    out = attend_within(q, k, v, Segments(runs_of(LENGTHS), offsets), dropout_p=0.5)
    assert not torch.equal(out, plain(q, k, v, is_causal=False))


def test_the_installed_kernel_takes_what_it_is_given():
    if _segments.varlen_attn is None:
        pytest.skip("this torch has no torch.nn.attention.varlen, which came with 2.10")
    if not torch.cuda.is_available():
        pytest.skip("torch.nn.attention.varlen runs on a GPU only, and there is none")
    q, k, v = (heads(n, seed).to("cuda", torch.bfloat16) for n, seed in ((6, 0), (2, 1), (2, 2)))
    out = attend_within(q, k, v, cut(runs_of(LENGTHS), q), is_causal=True).float()
    right = plain(*(x.float() for x in (q, k, v)), True)
    assert (out - right).abs().max() < 0.05 * right.abs().max()
    assert F.cosine_similarity(out.flatten(), right.flatten(), dim=0) > 0.999
