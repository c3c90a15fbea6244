"""The decoder's attention against plain arithmetic, in every form of mask."""

from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from torchtune_qwen25vl.generation._cache import Cache
from torchtune_qwen25vl.model._attention import DecoderAttention, prepare
from torchtune_qwen25vl.model._positional_embeddings import MultimodalRotaryEmbedding, rotate
from torchtune_qwen25vl.model._segments import repeated

B, S, HEADS, KV_HEADS, HEAD_DIM = 2, 11, 6, 2, 8
TOLERANCE = 1e-6  # fp32 sums of eleven products of unit scale


@pytest.fixture
def attn():
    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    return DecoderAttention(
        embed_dim=width,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        q_proj=torch.nn.Linear(width, width),
        k_proj=torch.nn.Linear(width, KV_HEADS * HEAD_DIM),
        v_proj=torch.nn.Linear(width, KV_HEADS * HEAD_DIM),
        output_proj=torch.nn.Linear(width, width, bias=False),
        max_seq_len=64,
    )


@pytest.fixture
def x():
    return torch.randn(B, S, HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(1))


def rotation(positions=None, b=B, s=S):
    rope = MultimodalRotaryEmbedding(HEAD_DIM, 1e4, [1, 2, 1])
    return rope(positions, (b, s))


def plain(attn, x, mask, turn):
    """Scores, softmax and sums written out; query head h reads key head h // 3."""
    q, k, v = (
        proj(x).unflatten(-1, (-1, HEAD_DIM)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    q, k = rotate(q, turn), rotate(k, turn)
    out = torch.empty_like(q)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / HEAD_DIM**0.5  # [b, s, s]
        out[:, :, head] = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, :, shared]
    return attn.output_proj(out.flatten(2))


def causal(s=S):
    return torch.ones(1, s, s, dtype=torch.bool).tril()


def left_padded():
    padding = torch.tensor([0, 4])
    real = torch.arange(S) >= padding[:, None]
    return causal() & real[:, None] | torch.eye(S, dtype=torch.bool)


def blocks(lengths):
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (owner[:, None] == owner).tril()[None]


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mask", [None, left_padded()], ids=["causal", "left padded"])
def test_equals_plain_arithmetic(attn, x, mask, device, monkeypatch):
    calls = []
    kernel = F.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        calls.append((k.shape[1], options["enable_gqa"]))
        return kernel(*(heads.as_subclass(torch.Tensor) for heads in (q, k, v)), **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    on_device = x.as_subclass(OnGPU) if device == "cuda" else x
    ours = attn(on_device, rotation=rotation(), mask=prepare(mask, x))
    theirs = plain(attn, x, causal() if mask is None else mask, rotation())
    assert (ours - theirs).abs().max() < TOLERANCE
    wrong = plain(attn, x, torch.ones(1, S, S, dtype=torch.bool), rotation())
    assert (ours - wrong).abs().max() > 1e-2
    # fused kernels of a GPU take shared heads or a mask, not both
    copies = device == "cuda" and mask is not None
    assert calls == [(HEADS, False) if copies else (KV_HEADS, True)]


def test_heads_are_copied_to_the_queries_that_share_them():
    q, k, v = (torch.randn(1, heads, 3, 4) for heads in (HEADS, KV_HEADS, KV_HEADS))
    keys, values = repeated(q, k, v, dim=1)
    for head in range(HEADS):
        assert torch.equal(keys[:, head], k[:, head // 3])
        assert torch.equal(values[:, head], v[:, head // 3])


@dataclass
class Blocks:
    """What stands for a BlockMask where there is no flex attention."""

    dense: torch.Tensor


def test_a_block_mask_goes_to_torchtunes_attention_with_keys_of_every_head(attn, x):
    def flex(q, k, v, *, mask, dropout_p, is_causal):
        assert k.shape == v.shape == q.shape == (1, HEADS, S, HEAD_DIM)
        assert (dropout_p, is_causal) == (0.0, False)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense[:, None])

    attn._attention_call = flex
    x, mask = x[:1], blocks([4, 1, 6])
    out = attn(x, rotation=rotation(b=1), mask=Blocks(mask))
    assert (out - plain(attn, x, mask, rotation(b=1))).abs().max() < TOLERANCE
    assert (out - plain(attn, x, causal(), rotation(b=1))).abs().max() > 1e-2


FORMS = {
    "causal": (None, S),
    "left padded": (left_padded(), S),
    "lengths": (torch.tensor([4, 7]), S),
    "one token": (None, 1),
    "one token, padded": (torch.ones(1, 1, 1, dtype=torch.bool), 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_dropped_while_training_only(attn, x, form):
    mask, length = FORMS[form]
    x = x[:1, :length]
    mask = mask[-1:] if mask is not None and mask.ndim == 3 else mask
    attn.attn_dropout = 0.5

    def out():
        return attn(x, rotation=rotation(b=1, s=length), mask=prepare(mask, x))

    seen = out()
    attn.eval()
    expected = out()
    assert torch.equal(out(), expected)
    assert (seen - expected).abs().max() > 1e-2
    attn.attn_dropout = 0.0
    assert torch.equal(out(), expected)


def test_samples_of_a_packed_row_do_not_see_each_other(attn, x):
    lengths = [4, 1, 6]
    out = attn(x[:1], rotation=rotation(b=1), mask=prepare(blocks(lengths), x))
    by_sample = attn(x[:1], rotation=rotation(b=1), mask=prepare(torch.tensor(lengths), x))
    assert (by_sample - out).abs().max() < TOLERANCE
    wrong = attn(x[:1], rotation=rotation(b=1), mask=prepare(torch.tensor([5, 6]), x))
    assert (wrong - out).abs().max() > 1e-2


@pytest.mark.parametrize("padded", [False, True])
def test_one_token_at_a_time_against_a_cache(attn, x, padded):
    """A cache filled by a prompt and continued gives what the whole row gives; unread memory of
    the cache may hold anything.
    """
    full_mask = left_padded() if padded else None
    expected = attn(x, rotation=rotation(), mask=prepare(full_mask, x))
    cache = Cache((B, KV_HEADS, S + 3, HEAD_DIM), x)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    start = 7
    mask = prepare(None if full_mask is None else full_mask[:, :start, :start], x)
    steps = [attn(x[:, :start], rotation=rotation()[:, :start], mask=mask, cache=cache)]
    for k in range(start, S):
        mask = prepare(None if full_mask is None else full_mask[:, k : k + 1, : k + 1], x)
        turn = rotation()[:, k : k + 1]
        steps.append(attn(x[:, k : k + 1], rotation=turn, mask=mask, cache=cache))
    assert (torch.cat(steps, dim=1) - expected).abs().max() < TOLERANCE
