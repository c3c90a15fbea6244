"""Sizes: the four published ones, each plain, with adapters (lora_) and on NF4 (qlora_), and any
size from a Hugging Face config.json.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchtune.modules.peft import LORA_ATTN_MODULES

from torchtune_qwen25vl.model._component_builders import qwen2_5_vl
from torchtune_qwen25vl.model._decoder import Qwen25VL
from torchtune_qwen25vl.model._tuning import Trainable

_published = partial(
    qwen2_5_vl,
    max_seq_len=128000,
    norm_eps=1e-6,
    rope_base=1e6,
    mrope_section=(16, 24, 24),
    image_token_id=151655,
    video_token_id=151656,
    vision_num_layers=32,
    vision_num_heads=16,
    vision_embed_dim=1280,
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=112,
    full_attn_indices=(7, 15, 23, 31),
)


def qwen2_5_vl_3b(**tuning: Any) -> Qwen25VL:
    """Build https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct; `tuning` as in `Tuning`."""
    return _published(
        vocab_size=151936,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        embed_dim=2048,
        intermediate_dim=11008,
        tie_word_embeddings=True,
        vision_intermediate_dim=3420,
        **tuning,
    )


def qwen2_5_vl_7b(**tuning: Any) -> Qwen25VL:
    """Build https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct; `tuning` as in `Tuning`."""
    return _published(
        vocab_size=152064,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        embed_dim=3584,
        intermediate_dim=18944,
        tie_word_embeddings=False,
        vision_intermediate_dim=3420,
        **tuning,
    )


def qwen2_5_vl_32b(**tuning: Any) -> Qwen25VL:
    """Build https://huggingface.co/Qwen/Qwen2.5-VL-32B-Instruct; `tuning` as in `Tuning`."""
    return _published(
        vocab_size=152064,
        num_layers=64,
        num_heads=40,
        num_kv_heads=8,
        embed_dim=5120,
        intermediate_dim=27648,
        tie_word_embeddings=False,
        vision_intermediate_dim=3456,
        **tuning,
    )


def qwen2_5_vl_72b(**tuning: Any) -> Qwen25VL:
    """Build https://huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct; `tuning` as in `Tuning`."""
    return _published(
        vocab_size=152064,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        embed_dim=8192,
        intermediate_dim=29568,
        tie_word_embeddings=False,
        vision_intermediate_dim=3456,
        **tuning,
    )


def _lora(
    size: Callable[..., Qwen25VL],
    lora_attn_modules: Sequence[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    decoder_trainable: Trainable = "lora",
    vision_trainable: Trainable = "frozen",
    merger_trainable: Trainable = "frozen",
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> Qwen25VL:
    """Build a size with adapters; the options are those of `Tuning`."""
    return size(
        lora_attn_modules=lora_attn_modules,
        apply_lora_to_mlp=apply_lora_to_mlp,
        apply_lora_to_output=apply_lora_to_output,
        decoder_trainable=decoder_trainable,
        vision_trainable=vision_trainable,
        merger_trainable=merger_trainable,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
    )


lora_qwen2_5_vl_3b = partial(_lora, qwen2_5_vl_3b)
lora_qwen2_5_vl_7b = partial(_lora, qwen2_5_vl_7b)
lora_qwen2_5_vl_32b = partial(_lora, qwen2_5_vl_32b)
lora_qwen2_5_vl_72b = partial(_lora, qwen2_5_vl_72b)

qlora_qwen2_5_vl_3b = partial(lora_qwen2_5_vl_3b, quantize_base=True)
qlora_qwen2_5_vl_7b = partial(lora_qwen2_5_vl_7b, quantize_base=True)
qlora_qwen2_5_vl_32b = partial(lora_qwen2_5_vl_32b, quantize_base=True)
qlora_qwen2_5_vl_72b = partial(lora_qwen2_5_vl_72b, quantize_base=True)


def qwen2_5_vl_from_config(config: str | Path | Mapping[str, Any], **tuning: Any) -> Qwen25VL:
    """Build the model that a Hugging Face config.json describes.

    Args:
        config: the file, the folder it is in, or what it holds. Both forms are read: text options
            at the top as on the hub, or under `text_config` as newer versions of transformers save.
        **tuning: the arguments of `Tuning`; by default everything is trained

    Raises:
        ValueError: if an option is missing, or is one this port does not compute.
    """
    try:
        sizes = _sizes(config if isinstance(config, Mapping) else _read(Path(config)))
    except KeyError as error:
        raise ValueError(
            f"config.json of a Qwen2.5-VL must have {error}; is it the one that came with the "
            "weights?"
        ) from None
    return qwen2_5_vl(**sizes, **tuning)


def _read(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json" if path.is_dir() else path).read_text())


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `qwen2_5_vl` in a config.json."""
    text, vision = config.get("text_config", config), config["vision_config"]
    rope = {**text, **(text.get("rope_parameters") or text.get("rope_scaling") or {})}
    rope.setdefault("rope_type", rope.get("type"))
    _must_be(config, model_type=["qwen2_5_vl"], quantization_config=[None])
    _must_be(text, hidden_act=["silu"], use_sliding_window=[False, None])
    _must_be(rope, rope_type=["default", "mrope"])
    _must_be(vision, hidden_act=["silu"], in_channels=[3], in_chans=[3])
    _must_be(vision, out_hidden_size=[text["hidden_size"]], tokens_per_second=[2])
    _must_be(vision.get("rope_parameters") or {}, rope_theta=[10000.0])
    return {
        "vocab_size": text["vocab_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": text["num_attention_heads"],
        "num_kv_heads": text["num_key_value_heads"],
        "embed_dim": text["hidden_size"],
        "intermediate_dim": text["intermediate_size"],
        "max_seq_len": text["max_position_embeddings"],
        "norm_eps": text["rms_norm_eps"],
        "rope_base": rope["rope_theta"],
        "mrope_section": rope["mrope_section"],
        "tie_word_embeddings": any(c.get("tie_word_embeddings") for c in (config, text)),
        "attn_dropout": text.get("attention_dropout", 0.0),
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


def _must_be(options: Mapping[str, Any], **supported: list[Any]) -> None:
    for name, values in supported.items():
        if name in options and options[name] not in values:
            raise ValueError(
                f"{name} must be {values[0]!r}, config.json has {options[name]!r}; this port "
                "computes nothing else"
            )
