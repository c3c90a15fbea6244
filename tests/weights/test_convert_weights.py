"""Conversion is a bijection on names and bits; adapters mean the same in PEFT as merged here."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch.nn import functional as F
from torchtune.modules.peft import get_merged_lora_ckpt

from parity import reference
from parity.inputs import LAYOUTS, make_inputs
from torchtune_qwen25vl.model._model_builders import (
    qwen2_5_vl_3b,
    qwen2_5_vl_7b,
    qwen2_5_vl_32b,
    qwen2_5_vl_72b,
)
from torchtune_qwen25vl.weights._names import (
    hf_to_tune,
    hf_weight_to_tune,
    on_disk_names,
    tune_to_hf,
)
from torchtune_qwen25vl.weights._peft import tune_to_peft

SIZES = {  # layers, heads, kv heads, width, intermediate, vocabulary, tied, vision intermediate
    "3b": (36, 16, 2, 2048, 11008, 151936, True, 3420),
    "7b": (28, 28, 4, 3584, 18944, 152064, False, 3420),
    "32b": (64, 40, 8, 5120, 27648, 152064, False, 3456),
    "72b": (80, 64, 8, 8192, 29568, 152064, False, 3456),
}
MODELS = {
    "3b": qwen2_5_vl_3b,
    "7b": qwen2_5_vl_7b,
    "32b": qwen2_5_vl_32b,
    "72b": qwen2_5_vl_72b,
}
RANK, ALPHA = 4, 12.0


def hf_model_on_meta(size):
    layers, heads, kv_heads, width, intermediate, vocab, tied, vision = SIZES[size]
    config = reference.Qwen2_5_VLConfig(
        text_config={
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "vocab_size": vocab,
        },
        vision_config={"hidden_size": 1280, "intermediate_size": vision, "out_hidden_size": width},
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return reference.Qwen2_5_VLForConditionalGeneration(config)


def on_disk(state):
    names = on_disk_names(state)
    return {names[key]: weight for key, weight in state.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def logits(model, inputs):
    with torch.no_grad():
        return model(**reference.forward_kwargs(inputs)).logits


@pytest.fixture(scope="module")
def hf_model():
    return reference.random_model("tiny")


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(LAYOUTS["image"], reference.IDS)


@pytest.mark.parametrize("size", SIZES)
def test_every_name_of_every_size_is_converted_and_back(size):
    theirs = reference.disk_state_dict(hf_model_on_meta(size))
    ours = hf_to_tune(theirs)
    with torch.device("meta"):
        model = MODELS[size]()
    assert {key: w.shape for key, w in ours.items()} == {
        key: w.shape for key, w in model.state_dict().items()
    }
    back = tune_to_hf(ours)
    assert sum(weight.numel() for weight in ours.values()) == sum(
        weight.numel() for weight in theirs.values()
    )
    assert ("output.weight" in ours) == (not SIZES[size][6])
    assert {key: w.shape for key, w in back.items()} == {
        key: w.shape for key, w in on_disk(theirs).items()
    }
    assert not any(key.startswith(("model.visual", "model.language_model")) for key in back)


@pytest.mark.parametrize("name", ["tiny", "tied"])
def test_round_trip_is_bit_equal_from_both_layouts(name):
    in_memory = reference.disk_state_dict(reference.random_model(name))
    legacy = on_disk(in_memory)
    assert legacy.keys() != in_memory.keys()
    ours = hf_to_tune(in_memory)
    assert_same(hf_to_tune(legacy), ours)
    assert_same(tune_to_hf(ours), legacy)
    assert_same(hf_to_tune(tune_to_hf(ours)), ours)


def test_exchanged_projections_would_be_seen(hf_model):
    theirs = on_disk(reference.disk_state_dict(hf_model))
    ours = hf_to_tune(theirs)
    for layer, name in (("vision.layers.0.attn", "visual.blocks.0.attn.qkv.weight"),):
        swapped = dict(ours)
        swapped[f"{layer}.q_proj.weight"] = ours[f"{layer}.k_proj.weight"]
        swapped[f"{layer}.k_proj.weight"] = ours[f"{layer}.q_proj.weight"]
        back = tune_to_hf(swapped)
        assert [key for key in back if not torch.equal(back[key], theirs[key])] == [name]


def test_fused_rows_are_q_then_k_then_v():
    fused = torch.arange(6.0).repeat_interleave(2).view(6, 2)
    parts = hf_weight_to_tune("visual.blocks.11.attn.qkv.weight", fused)
    assert {key: part[:, 0].tolist() for key, part in parts.items()} == {
        "vision.layers.11.attn.q_proj.weight": [0.0, 1.0],
        "vision.layers.11.attn.k_proj.weight": [2.0, 3.0],
        "vision.layers.11.attn.v_proj.weight": [4.0, 5.0],
    }


def test_patch_embedding_is_the_same_map_as_a_linear_layer(hf_model):
    kernel = reference.disk_state_dict(hf_model)["model.visual.patch_embed.proj.weight"].double()
    linear = hf_weight_to_tune("visual.patch_embed.proj.weight", kernel)
    patches = torch.randn(7, 3, 2, 14, 14).double()
    ours = F.linear(patches.flatten(1), linear["vision.patch_embed.proj.weight"])
    theirs = F.conv3d(patches, kernel).flatten(1)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    frames_last = F.linear(patches.transpose(1, 2).flatten(1), kernel.flatten(1))
    assert (frames_last - theirs).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.blocks.1.attn.qkv.bias": None}, r"1 missing \(visual.blocks.1.attn.qkv.bias\)"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "1 missing .model.layers.1.mlp.up_proj.we"),
        ({"model.layers.0.rotary_emb.inv_freq": 0}, "1 unexpected .model.layers.0.rotary_emb.inv"),
        ({"model.layers.x.mlp.up_proj.weight": 0}, "1 unexpected .model.layers.x"),
        (
            {"model.visual.merger.ln_q.weight": 0},
            "1 stand under both HF names .model.visual.merger.ln_q",
        ),
    ],
)
def test_wrong_names_are_refused(hf_model, change, message):
    state = on_disk(reference.disk_state_dict(hf_model))
    for key, new in change.items():
        if new is None:
            del state[key]
        else:
            state[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        hf_to_tune(state)


def test_a_missing_layer_is_named_with_the_count(hf_model):
    state = {
        k: w
        for k, w in on_disk(reference.disk_state_dict(hf_model)).items()
        if ".layers.1." not in k
    }
    with pytest.raises(ValueError, match=r"12 missing \(model\.layers\.1\..*\.\.\.\)"):
        hf_to_tune(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision.layers.0.attn.k_proj.bias": None}, "1 missing .vision.layers.0.attn.k_proj.b"),
        ({"layers.0.attn.q_proj.lora_a.weight": 0}, "1 unexpected .layers.0.attn.q_proj.lora_a"),
    ],
)
def test_an_incomplete_model_or_unmerged_adapter_is_refused(hf_model, change, message):
    state = hf_to_tune(reference.disk_state_dict(hf_model))
    for key, new in change.items():
        if new is None:
            del state[key]
        else:
            state[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        tune_to_hf(state)


# Adapters. What is trained is chosen by a prefix and the names of linear layers.

DECODER = [f"layers.{n}.attn.{p}" for n in range(3) for p in ("q_proj", "v_proj", "output_proj")]
DECODER_MLP = [f"layers.{n}.mlp.{p}" for n in range(3) for p in ("w1", "w2", "w3")]
QKV = [f"vision.layers.{n}.attn.{p}_proj" for n in range(4) for p in "qkv"]
VISION = [f"vision.layers.{n}.{p}" for n in range(4) for p in ("attn.output_proj", "mlp.w1")]
MERGER = ["vision.merger.w1", "vision.merger.w2"]


def adapter_for(state, modules, *, dora=False):
    """Random LoRA or DoRA weights that change every output clearly."""
    generator = torch.Generator().manual_seed(1)
    adapter = {}
    for module in modules:
        weight = state[f"{module}.weight"]
        d_out, d_in = weight.shape
        a = torch.randn(RANK, d_in, generator=generator) / d_in**0.5
        b = 0.1 * torch.randn(d_out, RANK, generator=generator)
        adapter |= {f"{module}.lora_a.weight": a, f"{module}.lora_b.weight": b}
        if dora:
            merged = weight + ALPHA / RANK * b @ a
            scale = 1 + 0.2 * torch.rand(d_out, generator=generator)
            adapter[f"{module}.magnitude"] = scale * merged.norm(dim=1)
    return adapter


def merged_model(hf_model, state, adapter):
    model = copy.deepcopy(hf_model)
    merged = get_merged_lora_ckpt({k: w.clone() for k, w in state.items()} | adapter, RANK, ALPHA)
    names = {name: key for key, name in on_disk_names(model.state_dict()).items()}
    model.load_state_dict({names[name]: w for name, w in tune_to_hf(merged).items()})
    return model


def peft_model(hf_model, folder, weights, config):
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return PeftModel.from_pretrained(copy.deepcopy(hf_model), folder)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    "modules",
    [DECODER, DECODER_MLP, QKV, DECODER + QKV + VISION + MERGER + ["output"]],
    ids=["decoder", "mlp", "qkv", "all"],
)
def test_peft_form_gives_the_logits_of_the_merged_weights(
    tmp_path, hf_model, inputs, modules, dora
):
    state = hf_to_tune(reference.disk_state_dict(hf_model))
    adapter = adapter_for(state, modules, dora=dora)
    merged = logits(merged_model(hf_model, state, adapter), inputs)
    weights, config = tune_to_peft(adapter, rank=RANK, alpha=ALPHA)
    model = peft_model(hf_model, tmp_path / "adapter", weights, config)
    torch.testing.assert_close(logits(model, inputs), merged, atol=2e-5, rtol=0)
    assert (logits(hf_model, inputs) - merged).abs().max() > 1e-2
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == len(modules) - 2 * len([m for m in modules if m.endswith("k_proj")])


def test_scale_of_the_fused_adapter_matters(tmp_path, hf_model, inputs):
    state = hf_to_tune(reference.disk_state_dict(hf_model))
    adapter = adapter_for(state, QKV)
    merged = logits(merged_model(hf_model, state, adapter), inputs)
    weights, config = tune_to_peft(adapter, rank=RANK, alpha=ALPHA)
    assert config["rank_pattern"] == {r"model\.visual\.blocks\.\d+\.attn\.qkv": 3 * RANK}
    model = peft_model(hf_model, tmp_path / "a", weights, config | {"alpha_pattern": {}})
    assert (logits(model, inputs) - merged).abs().max() > 1e-3


@pytest.mark.parametrize("present", ["q", "v", "qv", "qk", "kv"])
def test_lora_of_some_of_the_vision_projections(tmp_path, hf_model, inputs, present):
    """Each lands in its own rows of the fused layer, whichever are left out."""
    state = hf_to_tune(reference.disk_state_dict(hf_model))
    names = tuple(f"{letter}_proj" for letter in present)
    adapter = adapter_for(state, [module for module in QKV if module.endswith(names)])
    weights, config = tune_to_peft(adapter, rank=RANK, alpha=ALPHA)
    model = peft_model(hf_model, tmp_path / "a", weights, config)
    merged = logits(merged_model(hf_model, state, adapter), inputs)
    torch.testing.assert_close(logits(model, inputs), merged, atol=2e-5, rtol=0)
    assert (logits(hf_model, inputs) - merged).abs().max() > 1e-3


def test_parts_trained_in_full_beside_lora(tmp_path, hf_model, inputs):
    state = hf_to_tune(reference.disk_state_dict(hf_model))
    full = ("vision.merger", "vision.patch_embed", "vision.layers.3", "norm")
    trained = {key: w + 0.1 * w.std() for key, w in state.items() if key.startswith(full)}
    adapter = adapter_for(state, DECODER) | trained
    weights, config = tune_to_peft(adapter, rank=RANK, alpha=ALPHA)
    model = peft_model(hf_model, tmp_path / "a", weights, config)
    lora = {key: w for key, w in adapter.items() if key not in trained}
    merged = logits(merged_model(hf_model, state | trained, lora), inputs)
    torch.testing.assert_close(logits(model, inputs), merged, atol=2e-5, rtol=0)
    assert (logits(merged_model(hf_model, state, lora), inputs) - merged).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("modules", "extra", "message"),
    [
        ([], {}, "0 of 0 weights"),
        (DECODER, {"layers.0.attn.rope.lora_a.weight": 0}, "1 of 19 .*layers.0.attn.rope.lora_a"),
        (DECODER, {"vision.layers.0.attn.q_proj.bias": 0}, "1 of 19 .*vision.layers.0.attn.q"),
    ],
)
def test_what_peft_cannot_hold_is_refused(hf_model, modules, extra, message):
    adapter = adapter_for(hf_to_tune(reference.disk_state_dict(hf_model)), modules)
    with pytest.raises(ValueError, match=message):
        tune_to_peft(adapter | {key: torch.zeros(1) for key in extra}, rank=RANK, alpha=ALPHA)


def test_dora_of_the_vision_queries_alone_is_refused(hf_model):
    adapter = adapter_for(hf_to_tune(reference.disk_state_dict(hf_model)), QKV[::3], dora=True)
    with pytest.raises(ValueError, match="DoRA of the vision attention covers 1 of q_proj"):
        tune_to_peft(adapter, rank=RANK, alpha=ALPHA)
