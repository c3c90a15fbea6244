"""Builders: sizes, config.json, and every choice of what is trained."""

import json
import re

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import config as torchtune_config
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import (
    LoRALinear,
    get_adapter_params,
    get_merged_lora_ckpt,
    set_trainable_params,
    validate_missing_and_unexpected_for_lora,
)

from parity import reference
from torchtune_qwen25vl.model import _config, initializer_ranges
from torchtune_qwen25vl.model import _model_builders as builders
from torchtune_qwen25vl.model._model_builders import qwen2_5_vl_from_config
from torchtune_qwen25vl.model._tuning import DoRALinear

ATTN = ["q_proj", "k_proj", "v_proj", "output_proj"]
COUNTS = {  # all parameters, those of the vision encoder
    "3b": (3_754_622_976, 668_684_288),
    "7b": (8_292_166_656, 676_550_144),
    "32b": (33_452_718_336, 688_841_984),
    "72b": (73_410_777_344, 704_573_696),
}
HUB_3B = {  # as published, without what is for other programs
    "model_type": "qwen2_5_vl",
    "image_token_id": 151655,
    "video_token_id": 151656,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


PARTS = {
    "vision": ("vision.patch_embed.", "vision.layers."),
    "merger": ("vision.merger.",),
    "decoder": ("tok_embeddings.", "layers.", "norm.", "output."),
}


def part_of(name):
    """The one part that a weight belongs to."""
    (part,) = (part for part, modules in PARTS.items() if name.startswith(modules))
    return part


def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def settings_of(model):
    """All that decides what a model computes, apart from its weights."""
    vision, rope = model.vision, model.pos_embeddings
    return {
        "shapes": {name: weight.shape for name, weight in model.state_dict().items()},
        "ids": (model.image_token_id, model.video_token_id),
        "lengths": (model.max_seq_len, model.num_heads, model.head_dim),
        "rope": (rope.dim, rope.base, list(rope.mrope_section)),
        "eps": [module.eps for module in model.modules() if hasattr(module, "eps")],
        "vision": (vision.patch_size, vision.spatial_merge_size, vision.window_size),
        "full": vision.full_attn_indices,
        "heads": [
            (layer.attn.num_heads, getattr(layer.attn, "num_kv_heads", None))
            for layer in [*vision.layers, *model.layers]
        ],
        "dropout": {layer.attn.attn_dropout for layer in model.layers},
    }


@pytest.mark.parametrize("size", COUNTS)
def test_published_sizes(size):
    with torch.device("meta"):
        model = getattr(builders, f"qwen2_5_vl_{size}")()
    assert (size_of(model), size_of(model.vision)) == COUNTS[size]
    assert ("output.weight" in model.state_dict()) == (size != "3b")
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", COUNTS)
def test_published_sizes_with_adapters(size):
    with torch.device("meta"):
        model = getattr(builders, f"lora_qwen2_5_vl_{size}")(["q_proj", "v_proj"], lora_rank=4)
    adapters = get_adapter_params(model)
    assert len(adapters) == 4 * len(model.layers)
    assert size_of(model) - sum(p.numel() for p in adapters.values()) == COUNTS[size][0]
    quantize = getattr(builders, f"qlora_qwen2_5_vl_{size}")
    assert quantize.keywords == {"quantize_base": True}


def test_config_as_on_the_hub(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_3B))
    with torch.device("meta"):
        expected = settings_of(builders.qwen2_5_vl_3b())
        for given in (HUB_3B, tmp_path, str(tmp_path / "config.json")):
            assert settings_of(qwen2_5_vl_from_config(given)) == expected
        other = {**HUB_3B, "rms_norm_eps": 1e-5}
        assert settings_of(qwen2_5_vl_from_config(other)) != expected


def test_config_as_saved_by_transformers():
    text = {key: HUB_3B[key] for key in HUB_3B.keys() - {"vision_config", "rope_theta"}}
    text |= {"model_type": "qwen2_5_vl_text", "rope_scaling": None}
    text |= {"image_token_id": None, "video_token_id": None}  # of 4.52: they are of the whole
    text["rope_parameters"] = {
        **HUB_3B["rope_scaling"],
        "rope_type": "default",
        "rope_theta": HUB_3B["rope_theta"],
    }
    nested = {
        "model_type": "qwen2_5_vl",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "tie_word_embeddings": False,  # transformers 4.57 has it under text_config only
        "text_config": text,
        "vision_config": {
            **HUB_3B["vision_config"],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
        },
    }
    with torch.device("meta"):
        expected = settings_of(builders.qwen2_5_vl_3b())
        assert settings_of(qwen2_5_vl_from_config(nested)) == expected


def test_missing_fields_are_the_defaults_of_transformers():
    theirs = type(reference.model("tiny").config)().to_dict()
    assert _config.TEXT_DEFAULTS.keys() - {"rope_theta"} <= theirs["text_config"].keys()
    for key, value in _config.TEXT_DEFAULTS.items():
        assert {**theirs["text_config"], "rope_theta": 1e6}[key] == value, key
    for key, value in _config.VISION_DEFAULTS.items():
        assert (
            list(theirs["vision_config"][key]) == value
            if key.startswith("fullatt")
            else (theirs["vision_config"][key] == value)
        ), key


def test_config_as_transformers_4_49_saved_it():
    """Only what differs from the defaults: for 3B, and for 72B, which is nearly all default."""
    small = {
        key: value for key, value in HUB_3B.items() if _config.TEXT_DEFAULTS.get(key, ...) != value
    }
    vision = {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl"}
    vision |= {"spatial_patch_size": 14, "tokens_per_second": 2}
    small["vision_config"] = {**vision, "out_hidden_size": 2048}
    assert "rope_theta" not in small
    large = {key: HUB_3B[key] for key in ("model_type", "image_token_id", "video_token_id")}
    large |= {key: HUB_3B[key] for key in ("rope_scaling", "rms_norm_eps")}
    large["max_position_embeddings"] = 128000
    large["vision_config"] = {**vision, "out_hidden_size": 8192, "intermediate_size": 3456}
    with torch.device("meta"):
        for config, build in ((small, builders.qwen2_5_vl_3b), (large, builders.qwen2_5_vl_72b)):
            assert settings_of(qwen2_5_vl_from_config(config)) == settings_of(build())


VARIED = [
    (None, "vocab_size", 152064),
    (None, "hidden_size", 4096),
    (None, "intermediate_size", 11000),
    (None, "num_hidden_layers", 35),
    (None, "num_attention_heads", 8),
    (None, "num_key_value_heads", 4),
    (None, "max_position_embeddings", 32768),
    (None, "rms_norm_eps", 1e-5),
    (None, "rope_theta", 1e4),
    (None, "rope_scaling", {"type": "mrope", "mrope_section": [24, 24, 16]}),
    (None, "tie_word_embeddings", False),
    (None, "attention_dropout", 0.1),
    (None, "image_token_id", 7),
    (None, "video_token_id", 8),
    ("vision_config", "depth", 31),
    ("vision_config", "num_heads", 8),
    ("vision_config", "hidden_size", 640),
    ("vision_config", "intermediate_size", 3456),
    ("vision_config", "patch_size", 16),
    ("vision_config", "spatial_merge_size", 4),
    ("vision_config", "window_size", 56),
    ("vision_config", "fullatt_block_indexes", [3, 31]),
]


@pytest.mark.parametrize(("section", "key", "value"), VARIED)
def test_every_field_that_is_read_counts(section, key, value):
    config = json.loads(json.dumps(HUB_3B))
    (config if section is None else config[section])[key] = value
    if key in ("hidden_size", "num_attention_heads") and section is None:
        width = config["hidden_size"]
        config["vision_config"]["out_hidden_size"] = width
        eighth = width // config["num_attention_heads"] // 8
        config["rope_scaling"]["mrope_section"] = [eighth, eighth, 2 * eighth]
    with torch.device("meta"):
        changed, published = qwen2_5_vl_from_config(config), builders.qwen2_5_vl_3b()
    assert settings_of(changed) != settings_of(published)


def test_the_fields_that_are_read_are_all_varied():
    for section, defaults in (
        (None, _config.TEXT_DEFAULTS),
        ("vision_config", _config.VISION_DEFAULTS),
    ):
        varied = {key for of, key, _, *_ in [*VARIED, *UNSUPPORTED] if of == section}
        assert defaults.keys() - varied == {"initializer_range"}  # see the test of new weights


def test_new_weights_are_as_wide_as_the_config_says():
    config = json.loads(json.dumps(HUB_3B))
    default = {"vision": 0.02, "merger": 0.02, "decoder": 0.02}
    assert initializer_ranges(config) == default
    config["initializer_range"] = 0.05
    config["vision_config"]["initializer_range"] = 0.01
    changed = {"vision": 0.01, "merger": 0.01, "decoder": 0.05}
    assert initializer_ranges(config) == changed
    assert initializer_ranges({**config, "text_config": {"initializer_range": 0.03}}) == {
        **changed,
        "decoder": 0.03,
    }


def test_config_with_odd_sizes():
    config = reference.config_dict(reference.model("tiny"))
    model = qwen2_5_vl_from_config(config)
    assert len(model.layers) == config["text_config"]["num_hidden_layers"]
    assert model.image_token_id == config["image_token_id"]
    assert size_of(model) == reference.model("tiny").num_parameters()


UNSUPPORTED = [
    (None, "model_type", "qwen2_vl", "model_type must be 'qwen2_5_vl', .* 'qwen2_vl'"),
    (None, "quantization_config", {"quant_method": "awq"}, "quantization_config .* 'awq'"),
    (None, "use_sliding_window", True, "use_sliding_window must be False"),
    (None, "hidden_act", "gelu", "hidden_act must be 'silu'"),
    (None, "rope_scaling", {"type": "yarn", "mrope_section": [16, 24, 24]}, "rope_type .*yarn"),
    (None, "rope_scaling", {"type": "mrope"}, "must have 'mrope_section'"),
    (None, "image_token_id", ..., "must have 'image_token_id'"),
    (None, "vision_config", ..., "must have 'vision_config'"),
    ("vision_config", "hidden_act", "quick_gelu", "hidden_act must be 'silu'"),
    ("vision_config", "in_chans", 4, "in_chans must be 3"),
    ("vision_config", "out_hidden_size", 3584, "out_hidden_size must be 2048"),
    ("vision_config", "out_hidden_size", ..., "out_hidden_size must be 2048, .* has 3584"),
    ("vision_config", "in_channels", 1, "in_channels must be 3"),
    ("vision_config", "temporal_patch_size", 1, "temporal_patch_size must be 2"),
    ("vision_config", "tokens_per_second", 25, "tokens_per_second must be 2, .* has 25"),
    ("vision_config", "tokens_per_second", ..., "tokens_per_second must be 2, .* has 4"),
    ("vision_config", "rope_parameters", {"rope_theta": 1e6}, "rope_theta must be 10000.0"),
    ("vision_config", "rope_parameters", {"rope_type": "yarn"}, "rope_type must be 'axial'"),
    (None, "layer_types", ["full_attention", "sliding_attention"], "layer_types .*sliding"),
]
BAD_KINDS = [
    (None, "num_hidden_layers", 2.5, "num_hidden_layers must be a whole number above 0, .* 2.5"),
    (None, "num_hidden_layers", 0, "num_hidden_layers must be a whole number above 0"),
    (None, "num_attention_heads", 0, "num_attention_heads must be a whole number above 0"),
    (None, "num_attention_heads", 12, "must be a multiple of num_attention_heads = 12"),
    (None, "num_key_value_heads", 0, "num_key_value_heads must be a whole number above 0, or null"),
    (None, "vocab_size", "151936", "vocab_size must be a whole number above 0, .* '151936'"),
    (None, "max_position_embeddings", None, "max_position_embeddings must be a whole number"),
    (None, "rope_theta", "1e6", "rope_theta must be a number above 0, config.json has '1e6'"),
    (None, "rope_theta", -1.0, "rope_theta must be a number above 0"),
    (None, "rms_norm_eps", None, "rms_norm_eps must be a number above 0, config.json has None"),
    (None, "rms_norm_eps", float("nan"), "rms_norm_eps must be a number above 0, .* nan"),
    (None, "attention_dropout", None, "attention_dropout must be a number from 0 to 1"),
    (None, "attention_dropout", 1.5, "attention_dropout must be a number from 0 to 1"),
    (None, "initializer_range", "wide", "initializer_range must be a number from 0 on"),
    (None, "tie_word_embeddings", "yes", "tie_word_embeddings must be true, false or null"),
    (None, "image_token_id", "<|image_pad|>", "image_token_id must be the id of a token"),
    (None, "video_token_id", -1, "video_token_id must be the id of a token"),
    (None, "rope_scaling", "mrope", "rope_scaling of config.json holds options, got 'mrope'"),
    (None, "rope_scaling", {"type": "mrope", "mrope_section": 16}, "mrope_section must be a list"),
    (None, "text_config", [1], "text_config of config.json holds options"),
    (None, "vision_config", None, "vision_config of config.json holds options, got None"),
    ("vision_config", "depth", True, "depth must be a whole number above 0, config.json has True"),
    ("vision_config", "num_heads", 3, "hidden_size must be a multiple of num_heads = 3"),
    ("vision_config", "patch_size", None, "patch_size must be a whole number above 0"),
    ("vision_config", "window_size", 14, "window_size must be .* = 28 or more, .* has 14"),
    ("vision_config", "fullatt_block_indexes", 7, "fullatt_block_indexes must be a list of whole"),
    ("vision_config", "fullatt_block_indexes", None, "fullatt_block_indexes must be a list"),
]


@pytest.mark.parametrize(("section", "key", "value", "message"), UNSUPPORTED + BAD_KINDS)
def test_unsupported_configs_are_refused_by_name(section, key, value, message):
    config = json.loads(json.dumps(HUB_3B))
    holder = config if section is None else config[section]
    holder[key] = value
    if value is ...:
        del holder[key]
    with pytest.raises(ValueError, match=message):
        qwen2_5_vl_from_config(config)


def test_every_field_that_is_read_has_a_kind_or_one_value():
    kinds = {name for _, names in _config.KINDS.values() for name in names}
    one_value = {key for _, key, *_ in UNSUPPORTED}
    assert _config.TEXT_DEFAULTS.keys() | _config.VISION_DEFAULTS.keys() <= kinds | one_value


@pytest.mark.parametrize("content", ["{", "[]", "3", "\ufeff{}"])
def test_a_config_that_is_damaged_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json (is not JSON|holds one).*fetch it again"):
        qwen2_5_vl_from_config(tmp_path)


@pytest.mark.parametrize("size", ["tied", "mrope"])
def test_sizes_that_contradict_are_refused(size):
    options, message = {
        "tied": (
            {
                "tie_word_embeddings": True,
                "decoder_trainable": "lora",
                "lora_attn_modules": ATTN,
                "apply_lora_to_output": True,
            },
            "takes no adapter",
        ),
        "mrope": ({"mrope_section": (16, 24, 24)}, "half the head dim"),
    }[size]
    with pytest.raises(ValueError, match=message):
        tiny.model(**options)


@pytest.mark.parametrize("decoder", ["frozen", "full", "lora"])
@pytest.mark.parametrize("vision", ["frozen", "full", "lora"])
@pytest.mark.parametrize("merger", ["frozen", "full", "lora"])
def test_parts_are_trained_as_chosen(decoder, vision, merger):
    trainable = {"decoder": decoder, "vision": vision, "merger": merger}
    options = {f"{part}_trainable": how for part, how in trainable.items()}
    if "lora" in trainable.values():
        options |= {"lora_attn_modules": ATTN, "apply_lora_to_mlp": True}
    model, inputs = tiny.model(**options), tiny.inputs()
    logits = model(**inputs.ours)
    if set(trainable.values()) != {"frozen"}:
        logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        how = trainable[part_of(name)]
        assert parameter.requires_grad == (how == "full" or (how == "lora" and "lora" in name))
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    adapted = {part_of(name) for name in get_adapter_params(model)}
    assert adapted == {part for part, how in trainable.items() if how == "lora"}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_adapters_are_where_they_were_asked_for(use_dora, mlp, output):
    model = tiny.model(
        decoder_trainable="lora",
        vision_trainable="lora",
        merger_trainable="lora" if mlp else "frozen",
        lora_attn_modules=["q_proj", "output_proj"],
        apply_lora_to_mlp=mlp,
        apply_lora_to_output=output,
        use_dora=use_dora,
    )
    found = {
        re.sub(r"(?<=layers\.)\d+", "N", name)
        for name, module in model.named_modules()
        if isinstance(module, (LoRALinear, DoRALinear))
    }
    names = ["attn.q_proj", "attn.output_proj", *(["mlp.w1", "mlp.w2", "mlp.w3"] if mlp else [])]
    expected = {f"{tower}layers.N.{name}" for tower in ("", "vision.") for name in names}
    expected |= {"vision.merger.w1", "vision.merger.w2"} if mlp else set()
    expected |= {"output"} if output else set()
    assert found == expected
    assert any("magnitude" in name for name in get_adapter_params(model)) == use_dora
    # torchtune's recipes load the base weights and accept what this function does
    base = {k: v for k, v in model.state_dict().items() if k not in get_adapter_params(model)}
    missing, unexpected = model.load_state_dict(base, strict=False)
    validate_missing_and_unexpected_for_lora(
        ["q_proj", "output_proj"], mlp, output, base_missing=missing, base_unexpected=unexpected
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weights_give_the_same_logits(use_dora):
    options = {
        "decoder_trainable": "lora",
        "vision_trainable": "lora",
        "merger_trainable": "lora",
        "lora_attn_modules": ATTN,
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": True,
        "lora_rank": 4,
        "lora_alpha": 3,  # not twice the rank, by which a wrong scale would hide
    }
    model, plain, inputs = tiny.model(**options, use_dora=use_dora), tiny.model(), tiny.inputs()
    with torch.no_grad():
        for name, parameter in get_adapter_params(model).items():
            if name.endswith("magnitude"):
                parameter *= 1.1  # as after some training
        expected = model(**inputs.ours)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        plain.load_state_dict(get_merged_lora_ckpt(before, rank=4, alpha=3), strict=True)
        assert (plain(**inputs.ours) - expected).abs().max() < 2e-5
        base = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
        plain.load_state_dict(base, strict=True)
        assert (plain(**inputs.ours) - expected).abs().max() > 1e-2


def test_dropout_acts_while_training_only():
    options = {"decoder_trainable": "lora", "lora_attn_modules": ATTN, "lora_dropout": 0.5}
    model, tokens = tiny.model(**options), tiny.text(2, 6)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert (model(tokens) - model(tokens)).abs().max() > 1e-3


NF4_SIZES = {  # torchao wants multiples of 64 * 256 weights
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 256,
    "intermediate_dim": 384,
    "mrope_section": (8, 12, 12),
}


@pytest.mark.parametrize("use_dora", [False, True])
def test_nf4_holds_the_decoder_only(use_dora):
    options = {
        **NF4_SIZES,
        "decoder_trainable": "lora",
        "vision_trainable": "lora",
        "merger_trainable": "frozen",
        "lora_attn_modules": ["q_proj", "v_proj"],
        "use_dora": use_dora,
    }
    quantized, plain = tiny.model(**options, quantize_base=True), tiny.model(**options)
    nf4 = {
        name
        for name, module in quantized.named_modules()
        if isinstance(module, FrozenNF4Linear) or getattr(module, "_quantize_base", False)
    }
    assert nf4 == {
        name
        for name, module in plain.named_modules()
        if isinstance(module, (nn.Linear, LoRALinear, DoRALinear))
        and name.startswith("layers.")
        and "lora" not in name
    }
    restored = quantized.state_dict()
    assert restored.keys() == plain.state_dict().keys()
    assert all(type(weight) is torch.Tensor for weight in restored.values())
    inputs = tiny.inputs()
    plain.load_state_dict(restored)  # the same values, without NF4
    with torch.no_grad():
        assert (quantized(**inputs.ours) - plain(**inputs.ours)).abs().max() < 1e-4
    quantized(**inputs.ours).square().mean().backward()
    for name, parameter in get_adapter_params(quantized).items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_frozen_decoder_may_be_nf4():
    options = {"vision_trainable": "lora", "merger_trainable": "frozen", "lora_attn_modules": ATTN}
    model = tiny.model(**NF4_SIZES, **options, decoder_trainable="frozen", quantize_base=True)
    assert type(model.layers[0].attn.q_proj) is FrozenNF4Linear
    model(**tiny.inputs().ours).square().mean().backward()
    assert all(parameter.grad.any() for parameter in get_adapter_params(model).values())


def test_as_torchtunes_lora_recipes_use_it(tmp_path):
    config = reference.config_dict(reference.model("tiny"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = OmegaConf.create(
        {
            "_component_": "torchtune_qwen25vl.model._model_builders.qwen2_5_vl_from_config",
            "config": str(tmp_path),
            "lora_attn_modules": ["q_proj", "v_proj"],
            "decoder_trainable": "lora",
            "vision_trainable": "frozen",
            "merger_trainable": "full",
        }
    )
    model = torchtune_config.instantiate(cfg)
    adapters = get_adapter_params(model)
    assert len(adapters) == 2 * 2 * len(model.layers)
    set_trainable_params(model, adapters)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapters)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="lora_rnak"):
        tiny.model(lora_rnak=4)
