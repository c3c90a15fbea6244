"""The factory of linear layers, and DoRA with biases."""

import pytest
import torch
from torch import nn
from torchtune.modules import peft
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import disable_adapter, get_merged_lora_ckpt

from torchtune_qwen25vl.model._products import Linear
from torchtune_qwen25vl.model._tuning import DoRALinear, LoRALinear, Tuning

RANK, ALPHA = 4, 3  # not twice the rank, by which a wrong scale would hide
LORA = {"decoder_trainable": "lora", "lora_attn_modules": ("q_proj",)}


@pytest.mark.parametrize(
    ("rank", "alpha", "use_bias", "quantize_base"),
    [(4, 16, False, False), (3, 2, True, False), (5, 5, True, True), (7, 30, False, True)],
)
def test_lora_equals_stock_in_output_and_gradients(rank, alpha, use_bias, quantize_base):
    def outcome(kind, alpha=alpha):
        torch.manual_seed(0)
        options = {"use_bias": use_bias, "quantize_base": quantize_base}
        layer = kind(128, 128, rank=rank, alpha=alpha, **options)
        nn.init.normal_(layer.lora_b.weight)
        x = torch.randn(2, 3, 128, requires_grad=True)
        out = layer(x)
        out.square().sum().backward()
        layer.disabled = True
        return out, x.grad, layer.lora_a.weight.grad, layer.lora_b.weight.grad, layer(x)

    ours, stock, wrong = (
        outcome(LoRALinear),
        outcome(peft.LoRALinear),
        outcome(LoRALinear, alpha + 1),
    )
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4 * float(theirs.abs().max()))
    for mine, theirs in zip(wrong[:4], stock[:4], strict=True):
        assert (mine - theirs).abs().max() > 1e-2 * theirs.abs().max()


def dora(layer=DoRALinear, *, use_bias, quantize_base=False):
    """A layer after some training: nothing is where it was initialised."""
    torch.manual_seed(0)
    built = layer(128, 128, rank=RANK, alpha=ALPHA, use_bias=use_bias, quantize_base=quantize_base)
    nn.init.normal_(built.lora_b.weight, std=0.1)
    built.initialize_dora_magnitude()
    with torch.no_grad():
        built.magnitude *= 1 + 0.2 * torch.rand(128)
    return built


def merged(layer, x):
    weights = get_merged_lora_ckpt(
        {f"layer.{name}": weight.clone() for name, weight in layer.state_dict().items()},
        RANK,
        ALPHA,
    )
    return nn.functional.linear(x, weights["layer.weight"], weights.get("layer.bias"))


@pytest.mark.parametrize("use_bias", [False, True])
def test_dora_merges_to_what_was_trained(use_bias):
    x = torch.randn(5, 128)
    layer, stock = dora(use_bias=use_bias), dora(peft.DoRALinear, use_bias=use_bias)
    assert (layer(x) - merged(layer, x)).abs().max() < 1e-5
    assert ((stock(x) - merged(stock, x)).abs().max() > 1e-3) == use_bias
    if not use_bias:
        assert (layer(x) - stock(x)).abs().max() < 1e-5


@pytest.mark.parametrize("quantize_base", [False, True])
def test_dora_starts_as_the_base_and_can_be_switched_off(quantize_base):
    x = torch.randn(5, 128)
    layer = DoRALinear(128, 128, rank=RANK, alpha=ALPHA, use_bias=True, quantize_base=quantize_base)
    layer.initialize_dora_magnitude()
    weight = layer.weight.to(torch.float32)
    base = nn.functional.linear(x, weight, layer.bias)
    assert (layer(x) - base).abs().max() < 1e-5
    trained = dora(use_bias=True, quantize_base=quantize_base)
    with disable_adapter(trained):
        off = trained(x)
    weight = trained.weight.to(torch.float32)
    assert (off - nn.functional.linear(x, weight, trained.bias)).abs().max() < 1e-5
    assert (trained(x) - off).abs().max() > 1e-3


def test_dora_trains_adapters_and_input_like_stock():
    layer, stock = dora(use_bias=False), dora(peft.DoRALinear, use_bias=False)
    x = torch.randn(5, 128)
    for module in (layer, stock):
        module(x).square().sum().backward()
    for name in layer.adapter_params():
        ours, theirs = (m.get_parameter(name).grad for m in (layer, stock))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert theirs.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_trainable": "lor"}, r"unknown \['lor'\]"),
        ({**LORA, "lora_attn_modules": ("o_proj",)}, r"unknown \['o_proj'\]"),
        ({"decoder_trainable": "lora"}, "needs adapters"),
        ({"lora_attn_modules": ("q_proj",)}, "adapters need a part"),
        ({"apply_lora_to_mlp": True}, "adapters need a part"),
        ({**LORA, "merger_trainable": "lora"}, "the merger is an MLP"),
        ({"apply_lora_to_output": True}, "needs decoder_trainable 'lora'"),
        ({"quantize_base": True}, "cannot be trained"),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tuning(**options)


@pytest.mark.parametrize(
    ("options", "part", "name", "expected"),
    [
        ({}, "decoder", "q_proj", Linear),
        (LORA, "decoder", "q_proj", LoRALinear),
        (LORA, "decoder", "k_proj", Linear),
        (LORA, "decoder", "w1", Linear),
        (LORA, "vision", "q_proj", Linear),
        ({**LORA, "apply_lora_to_mlp": True}, "decoder", "w2", LoRALinear),
        ({**LORA, "apply_lora_to_output": True}, "decoder", "output", LoRALinear),
        ({**LORA, "use_dora": True}, "decoder", "q_proj", DoRALinear),
        ({**LORA, "vision_trainable": "lora"}, "vision", "q_proj", LoRALinear),
        ({**LORA, "quantize_base": True}, "decoder", "k_proj", FrozenNF4Linear),
        ({**LORA, "quantize_base": True}, "decoder", "output", Linear),
        ({**LORA, "quantize_base": True}, "vision", "k_proj", Linear),
    ],
)
def test_which_layer_is_made(options, part, name, expected):
    layer = Tuning(**options).linear(part)(name, 128, 256, bias=True)
    assert type(layer) is expected
    assert layer.weight.shape == (256, 128)
    assert layer.bias.shape == (256,)


def test_adapter_options_arrive():
    options = {"lora_rank": 3, "lora_alpha": 5, "lora_dropout": 0.25}
    layer = Tuning(**LORA, **options).linear("decoder")("q_proj", 8, 16, bias=False)
    assert (layer.rank, layer.alpha, layer.dropout.p) == (3, 5, 0.25)
    assert layer.bias is None
    assert layer.lora_b.weight.shape == (16, 3)
