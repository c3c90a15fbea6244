"""Weights packed for oneDNN: the same numbers, one copy of the weights, and what it refuses."""

import copy
import gc
import weakref

import pytest
import tiny
import torch
from torch import nn

from torchtune_qwen25vl import generate
from torchtune_qwen25vl.model import _packed, pack
from torchtune_qwen25vl.model._products import Linear
from torchtune_qwen25vl.model._tuning import LoRALinear

FP32 = {"rtol": 1e-5, "atol": 1e-5}  # sums in another order
BF16 = {"rtol": 2**-7, "atol": 2**-7}  # and rounded to 8 bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5,), (1, 1), (2, 1), (2, 7), (0,)])
def test_a_packed_layer_gives_what_the_plain_one_does(shape, bias, dtype):
    torch.manual_seed(len(shape))
    plain = nn.Linear(48, 40, bias=bias, dtype=dtype)
    layer = _packed.PackedLinear(plain.weight, plain.bias)
    x = torch.randn(*shape, 48, dtype=dtype)
    right = plain(x)
    assert layer(x).shape == right.shape
    torch.testing.assert_close(layer(x), right, **(FP32 if dtype == torch.float32 else BF16))


@pytest.mark.parametrize("vocab_size", [40, 512, 1300])
def test_a_packed_embedding_looks_up_and_projects(vocab_size):
    weight = torch.randn(vocab_size, 32)
    embedding = _packed.PackedEmbedding(weight)
    tokens = torch.randint(vocab_size, (3, 50))
    assert torch.equal(embedding(tokens), weight[tokens])
    x = torch.randn(3, 2, 32)
    torch.testing.assert_close(embedding.project(x), x @ weight.T, **FP32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["mixed batch", "image and video"])
def test_a_packed_model_says_the_same(layout, tied):
    batch = tiny.inputs(layout).padded_left().ours
    model = tiny.model(tie_word_embeddings=tied, vocab_size=1100)
    packed = pack(copy.deepcopy(model), least_weights=1)
    with torch.no_grad():
        logits = model(**batch)
        noise = 1e-5 * float(logits.abs().max())  # of sums as large as these
        torch.testing.assert_close(packed(**batch), logits, rtol=0, atol=noise)
    right = generate(model, batch, max_new_tokens=12).tokens
    assert torch.equal(generate(packed, batch, max_new_tokens=12).tokens, right)


def test_no_second_copy_of_a_weight_stays():
    model = tiny.model(tie_word_embeddings=True)
    plain = [weakref.ref(p) for p in model.parameters() if p.ndim == 2]
    total = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
    pack(model, least_weights=1)
    gc.collect()
    assert [ref for ref in plain if ref() is not None] == []
    held = [b for b in model.buffers() if b.is_mkldnn]
    assert sum(b.nbytes for b in held) == total


def test_layers_are_packed_one_at_a_time(monkeypatch):
    model = tiny.model(tie_word_embeddings=True)
    plain = [weakref.ref(p) for p in model.parameters() if p.ndim == 2]
    left, packed = [], _packed.PackedLinear.__init__

    def counted(self, *args):
        packed(self, *args)
        left.append(sum(ref() is not None for ref in plain))

    monkeypatch.setattr(_packed.PackedLinear, "__init__", counted)
    pack(model, least_weights=1)
    layers = len(plain) - 1  # and the embedding, whose blocks come last
    assert left[:layers] == list(range(len(plain), 1, -1))


def test_small_layers_and_layers_with_adapters_stay():
    model = tiny.model(
        decoder_trainable="lora",
        vision_trainable="frozen",
        merger_trainable="frozen",
        lora_attn_modules=["q_proj"],
        embed_dim=512,
        intermediate_dim=600,
        mrope_section=(22, 21, 21),
    )
    layer = pack(model).layers[0]
    assert type(layer.attn.q_proj) is LoRALinear
    assert type(layer.attn.k_proj) is _packed.PackedLinear  # 512 x 256
    assert type(layer.mlp.w1) is _packed.PackedLinear
    assert type(pack(tiny.model()).layers[0].mlp.w1) is Linear
    small = tiny.model().to(torch.bfloat16)
    assert type(pack(small).layers[0].mlp.w1) is _packed.PackedLinear


def test_float64_is_not_packed():
    assert not [b for b in pack(tiny.model().double(), least_weights=1).buffers() if b.is_mkldnn]


def test_a_packed_model_can_be_cast_and_released_but_not_saved():
    model = tiny.model(tie_word_embeddings=True)
    batch = tiny.inputs("image").ours
    with torch.no_grad():
        right = copy.deepcopy(model).double()(**batch)
        cast = pack(model, least_weights=1).double()
        torch.testing.assert_close(cast(**batch), right, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"weight is packed.*save the model before"):
        pack(tiny.model(), least_weights=1).state_dict()
    model.to_empty(device="meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
