"""Sizes: the four published ones, each plain, with adapters (lora_) and on NF4 (qlora_), and any
size from a Hugging Face config.json.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torchtune.modules.peft import LORA_ATTN_MODULES

from torchtune_qwen25vl.model._component_builders import qwen2_5_vl
from torchtune_qwen25vl.model._config import Config, sizes
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


def qwen2_5_vl_from_config(config: Config, **tuning: Any) -> Qwen25VL:
    """Build the model that a Hugging Face config.json describes.

    Args:
        config: the file, the folder it is in, or what it holds. Both forms are read: text options
            at the top as on the hub, or under `text_config` as newer versions of transformers save.
            A field that is missing has the default of transformers' config class.
        **tuning: the arguments of `Tuning`; by default everything is trained

    Raises:
        ValueError: if an option is missing that has no default, or is one this port does not
            compute.
    """
    return qwen2_5_vl(**sizes(config), **tuning)
