"""Layers in int4: the same products as their weights' nearest values, and what they refuse."""

import weakref

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from torchtune_qwen25vl import generate
from torchtune_qwen25vl.model import Int4Linear, _int4, hold_in_int4, multiplies_int4
from torchtune_qwen25vl.model._products import Linear
from torchtune_qwen25vl.weights import materialize

BF16 = torch.bfloat16
TILES = {"embed_dim": 256, "intermediate_dim": 512, "mrope_section": (8, 12, 12)}


def filled(weight, bias=None):
    layer = Int4Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.fill(weight)
    if bias is not None:
        layer.load_state_dict({"bias": bias}, assign=True)
    return layer


def nearest(weight):
    """Plain, in fp64: of 16 steps of each group of 64 the nearest; of two as near the even one."""
    rows = []
    for row in weight.double():
        for group in row.split(64):
            scale = ((group.max() - group.min()) / 15).to(BF16).double()
            zero_point = (group.min() + 8 * scale).to(BF16).double()
            codes = ((group - zero_point) / scale).round().clamp(-8, 7)
            rows.append(codes * scale + zero_point)
    return torch.cat(rows).view_as(weight)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 1), (2, 70), (0,)])
def test_a_layer_multiplies_by_the_nearest_values(shape, bias):
    torch.manual_seed(len(shape))
    weight, x = torch.randn(48, 384, dtype=BF16), torch.randn(*shape, 384, dtype=BF16)
    added = torch.randn(48, dtype=BF16) if bias else None
    right = x.double() @ nearest(weight).T + (0 if added is None else added.double())
    found = filled(weight, added)(x)
    assert found.dtype == BF16
    bound = 2**-7 * float(right.abs().max()) if right.numel() else 0.0
    torch.testing.assert_close(found.double(), right, rtol=0, atol=bound)
    if right.numel():  # the weight itself is farther away
        assert (x.double() @ weight.double().T - right).abs().max() > 5 * bound


def test_the_last_tokens_of_rows_may_lie_apart():
    layer, x = filled(torch.randn(48, 384, dtype=BF16)), torch.randn(3, 5, 384, dtype=BF16)
    last = x[:, -1:]
    assert torch.equal(layer(last), layer(last.contiguous()))


def test_a_layer_takes_nine_sixteenths_of_a_byte_a_weight():
    weight = torch.randn(64, 256, dtype=BF16)
    assert sum(buffer.nbytes for buffer in filled(weight).buffers()) == 9 / 16 * weight.numel()


def test_the_order_of_a_gpu_suits_its_kernel_in_shape():
    """As torch says it without a GPU; whether the numbers are right, one has to say."""
    layer = filled(torch.empty(48, 384, dtype=BF16, device="meta"))
    assert (layer.weight.shape, layer.weight.dtype) == ((6, 3, 32, 4), torch.int32)
    assert sum(buffer.nbytes for buffer in layer.buffers()) == 9 / 16 * 48 * 384
    with FakeTensorMode():
        for name, held in list(layer.named_buffers()):
            setattr(layer, name, torch.empty(held.shape, dtype=held.dtype, device="cuda"))
        found = layer(torch.empty(2, 5, 384, dtype=BF16, device="cuda"))
    assert (found.shape, found.dtype) == ((2, 5, 48), BF16)


def test_a_group_of_equal_weights_is_exact():
    weight = torch.full((16, 128), 0.3, dtype=BF16)
    weight[3:, 64:] = 0
    assert torch.equal(filled(weight)(torch.eye(128, dtype=BF16)).T, weight)


def test_rows_that_are_coded_in_blocks_are_the_same(monkeypatch):
    weight = torch.randn(80, 128, dtype=BF16)
    whole = filled(weight)
    monkeypatch.setattr(_int4, "BLOCK", 7 * 128)
    parts = filled(weight)
    assert torch.equal(whole.weight, parts.weight)
    assert torch.equal(whole.scales, parts.scales)


def in_int4(**options):
    """A tiny model in int4, and the same in bf16 with the nearest values for weights."""
    plain = tiny.model(**TILES, **options).to(BF16)
    with torch.device("meta"):
        model = hold_in_int4(tiny.qwen2_5_vl(**{**tiny.SIZES, **TILES, **options}))
    materialize(model, plain.state_dict().items(), device="cpu")
    for name, weight in plain.layers.named_parameters():
        if name.endswith(".weight") and weight.ndim == 2:
            weight.data.copy_(nearest(weight.data))
    return model.eval(), plain.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_says_what_its_nearest_values_say(tied):
    model, rounded = in_int4(tie_word_embeddings=tied)
    batch = tiny.inputs("mixed batch").padded_left().ours
    with torch.no_grad():
        found, right = model(**batch).float(), rounded(**batch).float()
        drawn = right.roll(1, -1)
    assert (found - right).abs().max() < 0.1 * (drawn - right).abs().max()
    assert generate(model, batch, max_new_tokens=4).tokens.shape == (len(found), 4)


def test_no_two_weights_are_there_in_full():
    with torch.device("meta"):
        model = hold_in_int4(tiny.qwen2_5_vl(**{**tiny.SIZES, **TILES}))
    held, most = [], 0

    def weights():
        nonlocal most
        for name, weight in tiny.model(**TILES).to(BF16).state_dict().items():
            fresh = weight.clone()
            if name.removesuffix(".weight") in quantised:
                held.append(weakref.ref(fresh))
                most = max(most, sum(ref() is not None for ref in held))
            yield name, fresh
            del fresh, weight

    quantised = {name for name, layer in model.named_modules() if isinstance(layer, Int4Linear)}
    materialize(model, weights(), device="cpu")
    assert len(held) == len(quantised)
    assert most == 2  # the one that comes, and the one before it, which the loop still names


def test_the_output_and_the_vision_tower_stay_as_they_are():
    model, _ = in_int4(tie_word_embeddings=False)
    assert type(model.output) is Linear
    assert not any(isinstance(layer, Int4Linear) for layer in model.vision.modules())


def test_what_is_not_whole_tiles_is_refused():
    for widths in ((100, 16), (128, 24)):
        with pytest.raises(ValueError, match="inputs in multiples of 128 and outputs in multiples"):
            Int4Linear(*widths, bias=False)
    with torch.device("meta"), pytest.raises(ValueError, match=r"layers.0.attn.q_proj: .*four_bit"):
        hold_in_int4(tiny.qwen2_5_vl(**tiny.SIZES))


def test_it_is_not_saved():
    model, _ = in_int4()
    with pytest.raises(ValueError, match=r"layers.0.attn.q_proj.weight is in int4 for"):
        model.state_dict()


def test_torch_is_asked_whether_it_can(monkeypatch):
    assert multiplies_int4(torch.device("cpu"))
    assert not multiplies_int4(torch.device("mps"))
    multiply = Int4Linear.forward
    monkeypatch.setattr(Int4Linear, "forward", lambda self, x: multiply(self, x) + 1)
    assert not multiplies_int4(torch.device("cpu"))  # a kernel that is there, and wrong
