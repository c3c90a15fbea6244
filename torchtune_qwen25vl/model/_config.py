"""What a config.json says of a Qwen2.5-VL, and what it leaves to the class of transformers.

transformers 4.49.0 saved only what differs from the defaults of its config classes, so a field that
is missing means that default. No default differs between 4.49.0 and 5.23.0.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchtune_qwen25vl._files import read_object

TEXT_DEFAULTS = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "rope_theta": 1e6,
}
VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,  # every published config has 2
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "initializer_range": 0.02,
}
OF_THE_WHOLE = {"image_token_id", "video_token_id"}  # in `text_config` transformers 4.52 has null
KINDS: dict[str, tuple[Callable[[Any], bool], set[str]]] = {
    "a whole number above 0": (
        lambda value: type(value) is int and value > 0,
        {
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "max_position_embeddings", "depth", "num_heads"),
            *("patch_size", "spatial_merge_size", "window_size"),
        },
    ),
    "a whole number above 0, or null": (
        lambda value: value is None or (type(value) is int and value > 0),
        {"num_key_value_heads"},
    ),
    "the id of a token": (
        lambda value: type(value) is int and value >= 0,
        OF_THE_WHOLE,
    ),
    "a number above 0": (
        lambda value: _is_number(value) and value > 0,
        {"rms_norm_eps", "rope_theta"},
    ),
    "a number from 0 on": (
        lambda value: _is_number(value) and value >= 0,
        {"initializer_range"},
    ),
    "a number from 0 to 1": (
        lambda value: _is_number(value) and 0 <= value <= 1,
        {"attention_dropout"},
    ),
    "true, false or null": (lambda value: value in (True, False, None), {"tie_word_embeddings"}),
    "a list of whole numbers": (
        lambda value: isinstance(value, list | tuple) and all(type(one) is int for one in value),
        {"fullatt_block_indexes", "mrope_section"},
    ),
}
Config = str | Path | Mapping[str, Any]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def sizes(config: Config) -> dict[str, Any]:
    """Return the arguments of `qwen2_5_vl` for a config.json.

    Args:
        config: the file, the folder it is in, or what it holds

    Raises:
        ValueError: if an option is missing that has no default, is of the wrong kind, or is one
            this port does not compute.
    """
    try:
        return _sizes(_read(config))
    except KeyError as error:
        raise ValueError(
            f"config.json of a Qwen2.5-VL must have {error}; is it the one that came with the "
            "weights?"
        ) from None


def initializer_ranges(config: Config) -> dict[str, float]:
    """Return the standard deviation of new weights in vision, merger and decoder."""
    text, vision = _sections(_read(config))
    of_vision = vision["initializer_range"]
    return {
        "vision": of_vision,
        "merger": of_vision,
        "decoder": text["initializer_range"],
    }


def _read(config: Config) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    return read_object(path / "config.json" if path.is_dir() else path)


def _sections(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Complete the options of text and vision; text options are at the top or in `text_config`."""
    text = TEXT_DEFAULTS | _object("text_config", config.get("text_config") or config)
    vision = VISION_DEFAULTS | _object("vision_config", config["vision_config"])
    of_decoder = {name: value for name, value in text.items() if name not in OF_THE_WHOLE}
    for section in (config, of_decoder, vision):
        _check_kinds(section)
    return text, vision


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    text, vision = _sections(config)
    of_rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    _check_kinds(_object("rope_scaling", of_rope))
    rope = {**text, **of_rope}
    rope.setdefault("rope_type", rope.get("type"))
    vision_rope = vision.get("rope_parameters") or {}
    _must_be(config, model_type=["qwen2_5_vl"], quantization_config=[None])
    _must_be(text, hidden_act=["silu"], use_sliding_window=[False, None])
    _must_be(rope, rope_type=["default", "mrope"])
    _must_be(vision, hidden_act=["silu"], in_channels=[3], in_chans=[3], temporal_patch_size=[2])
    _must_be(vision, out_hidden_size=[text["hidden_size"]], tokens_per_second=[2])
    _must_share_out(text, "num_attention_heads")
    _must_share_out(vision, "num_heads")
    placeholder = vision["patch_size"] * vision["spatial_merge_size"]
    if vision["window_size"] < placeholder:
        raise ValueError(
            f"window_size must be patch_size * spatial_merge_size = {placeholder} or more, "
            f"config.json has {vision['window_size']}; correct the file"
        )
    _must_be(vision_rope, rope_type=["axial", "default"], rope_theta=[10000.0])
    for layer_type in text.get("layer_types") or []:
        _must_be({"layer_types": layer_type}, layer_types=["full_attention"])
    return {
        "vocab_size": text["vocab_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text["num_key_value_heads"] or text["num_attention_heads"],
        "embed_dim": text["hidden_size"],
        "intermediate_dim": text["intermediate_size"],
        "max_seq_len": text["max_position_embeddings"],
        "norm_eps": text["rms_norm_eps"],
        "rope_base": rope["rope_theta"],
        "mrope_section": rope["mrope_section"],
        "tie_word_embeddings": any(c.get("tie_word_embeddings") for c in (config, text)),
        "attn_dropout": text["attention_dropout"],
        "image_token_id": config["image_token_id"],
        "video_token_id": config["video_token_id"],
        "vision_num_layers": vision["depth"],
        "vision_num_heads": vision["num_heads"],
        "vision_embed_dim": vision["hidden_size"],
        "vision_intermediate_dim": vision["intermediate_size"],
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "spatial_merge_size": vision["spatial_merge_size"],
        "window_size": vision["window_size"],
        "full_attn_indices": vision["fullatt_block_indexes"],
    }


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} of config.json holds options, got {value!r}; correct the file")
    return dict(value)


def _check_kinds(options: Mapping[str, Any]) -> None:
    """Refuse the first option whose value cannot be one of its kind."""
    for kind, (fits, names) in KINDS.items():
        for name in sorted(names & options.keys()):
            if not fits(options[name]):
                raise ValueError(
                    f"{name} must be {kind}, config.json has {options[name]!r}; correct the file"
                )


def _must_share_out(options: Mapping[str, Any], heads: str) -> None:
    if options["hidden_size"] % options[heads]:
        raise ValueError(
            f"hidden_size must be a multiple of {heads} = {options[heads]}, config.json has "
            f"{options['hidden_size']}; correct the file"
        )


def _must_be(options: Mapping[str, Any], **supported: list[Any]) -> None:
    for name, values in supported.items():
        if name in options and options[name] not in values:
            raise ValueError(
                f"{name} must be {values[0]!r}, config.json has {options[name]!r} (what it leaves "
                "out is as in transformers' config class); this port computes nothing else"
            )
