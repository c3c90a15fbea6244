"""Their models: small ones with random weights, and checkpoints.

Random-weight models have outputs of unit scale (vision about 0.65, logits about 1), so that an
absolute error means the same in all of them and a fault cannot hide behind small numbers.
"""

import copy
import functools
import math
import re
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

# before 4.56 the argument bears its old name
DTYPE = "torch_dtype" if re.match(r"4\.([0-4]|5[0-5])", transformers.__version__) else "dtype"
RANDOM_MODELS = (
    *("tiny", "tied", "stress", "quiet", "deep", "wide", "wide_tied"),
    "tiny, Qwen's ids",
)
IDS = {
    "image_token_id": 1001,
    "video_token_id": 1002,
    "vision_start_token_id": 1003,
    "vision_end_token_id": 1004,
}
QWENS_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


def _config(vision: dict[str, Any], text: dict[str, Any], tied: bool) -> Qwen2_5_VLConfig:
    """A config in the flat form of the published config.json files."""
    return Qwen2_5_VLConfig(
        **{
            "vocab_size": 1024,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "use_sliding_window": False,
            "bos_token_id": 1005,
            "eos_token_id": 1006,
            "pad_token_id": 1007,
            **IDS,
            **text,
        },
        vision_config={"window_size": 112, "tokens_per_second": 2, **vision},
        tie_word_embeddings=tied,
    )


def config(name: str) -> Qwen2_5_VLConfig:
    """A small config by its name below."""
    tiny_vision = {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 108,
        "out_hidden_size": 96,
        "fullatt_block_indexes": [1, 3],
    }
    tiny_text = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    published_vision = {"hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    published_text = {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }
    published_7b = {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    }
    bench_vision = {**tiny_vision, "depth": 3, "hidden_size": 320, "intermediate_size": 856}
    few = {"depth": 2, "out_hidden_size": 2048, "fullatt_block_indexes": [1]}
    blocks = {  # of NF4, and whole tiles of int4
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    }
    deep = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
    parts = {
        "tiny": (tiny_vision, tiny_text, False),
        "tied": (tiny_vision, tiny_text, True),
        "stress": (tiny_vision, tiny_text, False),
        "quiet": (tiny_vision, tiny_text, False),
        "deep": (tiny_vision | deep, tiny_text | {"num_hidden_layers": 36}, False),
        "wide": (published_vision | few, published_text | {"num_hidden_layers": 2}, False),
        "wide_tied": (published_vision | few, published_text | {"num_hidden_layers": 2}, True),
        "encoder, windows": (bench_vision | {"fullatt_block_indexes": []}, tiny_text, False),
        "encoder, one full layer": (
            bench_vision | {"fullatt_block_indexes": [2]},
            tiny_text,
            False,
        ),
        "tiny, 3B's vocabulary": (tiny_vision, tiny_text | {"vocab_size": 151936}, True),
        "tiny, whole blocks": (tiny_vision | {"out_hidden_size": 256}, tiny_text | blocks, True),
        "tiny, Qwen's ids": (
            tiny_vision,
            tiny_text | {"vocab_size": 151936} | QWENS_IDS,
            True,
        ),
        "3B": (
            published_vision | deep | {"out_hidden_size": 2048},
            published_text | {"num_hidden_layers": 36, "vocab_size": 151936},
            True,
        ),
        "7B": (
            published_vision | deep | {"out_hidden_size": 3584},
            published_text | published_7b,
            False,
        ),
        "3B with few layers": (
            published_vision | few,
            published_text | {"num_hidden_layers": 2, "vocab_size": 151936},
            True,
        ),
        "3B with few layers, Qwen's ids": (
            published_vision | few,
            published_text | {"num_hidden_layers": 2, "vocab_size": 151936} | QWENS_IDS,
            True,
        ),
    }
    return _config(*copy.deepcopy(parts[name]))


@torch.no_grad()
def randomise(model: transformers.PreTrainedModel, seed: int, heavy_tails: bool = False) -> None:
    """Give every layer outputs of unit scale; with heavy tails, also a few huge channels.

    Heavy tails are Student's t with 3 degrees of freedom, and two residual channels that the
    first layers push to about 30 times the others and the norms take back, as trained models do.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if heavy_tails:
            chi = torch.randn(3, *parameter.shape, generator=generator).square().sum(0)
            noise = noise / (chi / 3).sqrt().clamp(min=0.3)
        if parameter.ndim == 1:
            is_norm = "norm" in name or "ln_q" in name
            parameter.copy_(1 + 0.1 * noise if is_norm else 0.1 * noise)
        elif "embed_tokens" in name and not model.config.tie_word_embeddings:
            parameter.copy_(noise)
        else:
            fan_in = math.prod(parameter.shape[1:])
            parameter.copy_(noise / math.sqrt(fan_in))
        if heavy_tails and name.endswith("0.mlp.down_proj.weight"):
            parameter[:2] *= 30
        if heavy_tails and "norm" in name and parameter.ndim == 1:
            parameter[:2] *= 0.03


@torch.no_grad()
def quieten(model: transformers.PreTrainedModel) -> None:
    """Make the vision tower's residual stream small, so that the eps of every norm matters."""
    writers = ("patch_embed.", ".attn.proj.", ".mlp.down_proj.")
    for name, parameter in model.named_parameters():
        if "visual." in name and any(writer in name for writer in writers):
            parameter *= 0.03


@functools.lru_cache(maxsize=8)
def random_model(name: str, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A random-weight fp32 model on the CPU; shared between callers, so leave it as it is."""
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        config(name), attn_implementation="sdpa", **{DTYPE: torch.float32}
    )
    model.tie_weights()
    randomise(model, seed, heavy_tails=name == "stress")
    if name == "quiet":
        quieten(model)
    return model.eval()


def sized_model(
    name: str, device: torch.device, dtype: torch.dtype
) -> Qwen2_5_VLForConditionalGeneration:
    """A model of true size, made on its device with random weights of unit scale."""
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config(name), attn_implementation="sdpa", **{DTYPE: dtype}
        )
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=math.prod(parameter.shape[1:]) ** -0.5)
    return model.eval()


def load(folder: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """A checkpoint by folder or hub id."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, attn_implementation="sdpa", **{DTYPE: dtype}
    )
    return model.eval()


load_model = functools.lru_cache(maxsize=1)(functools.partial(load, dtype=torch.float32))


@functools.lru_cache(maxsize=8)
def model(name: str, device: str = "cpu") -> Qwen2_5_VLForConditionalGeneration:
    """A random-weight model by name, or the checkpoint in this folder or of this hub id."""
    found = random_model(name) if name in RANDOM_MODELS else load_model(name)
    return found if device == "cpu" else copy.deepcopy(found).to(device)


def ids(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, int]:
    """The token ids that structure a conversation."""
    return {name: getattr(model.config, name) for name in IDS}


def config_dict(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, Any]:
    """Its config.json as a dictionary."""
    return model.config.to_dict()


def disk_state_dict(model: Qwen2_5_VLForConditionalGeneration) -> dict[str, Tensor]:
    """Its weights without the second name of a tied embedding, as save_pretrained writes them."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


@functools.lru_cache(maxsize=4)
def in_two_precisions(
    name: str, device: str
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration]:
    """The same bf16 weights as an fp32 and as a bf16 model.

    Both are loaded from a folder: `.to(bfloat16)` would also round the rotary frequencies, which
    from_pretrained leaves alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(random_model(name)).to(torch.bfloat16).save_pretrained(folder)
        exact, rounded = (load(folder, dtype) for dtype in (torch.float32, torch.bfloat16))
        return exact.to(device), rounded.to(device)
