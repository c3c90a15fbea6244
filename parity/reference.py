"""Theirs: everything the harness asks of Hugging Face transformers. Nothing else imports it.

Random-weight models have outputs of unit scale (vision about 0.65, logits about 1), so that an
absolute error means the same in all of them and a fault cannot hide behind small numbers.
"""

import copy
import functools
import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

try:  # transformers 5: the torchvision backend bears the plain name
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
except ImportError:  # transformers 4.57
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor as Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl_fast import (
        Qwen2VLImageProcessorFast as Qwen2VLImageProcessor,
    )
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from parity.inputs import Inputs

VERSION = transformers.__version__
transformers.logging.set_verbosity_error()

IDS = {
    "image_token_id": 1001,
    "video_token_id": 1002,
    "vision_start_token_id": 1003,
    "vision_end_token_id": 1004,
}


def image_processor(min_pixels: int = 3136, max_pixels: int = 1003520, **kwargs: Any) -> Any:
    """The default (torchvision) image processor with these limits in force."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2VLImageProcessor(size=size, **kwargs)


def pillow_image_processor(min_pixels: int = 3136, max_pixels: int = 1003520) -> Any:
    """The Pillow image processor, whose resize depends on the Pillow that is installed."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})


def video_processor(**kwargs: Any) -> Any:
    """The video processor; sampling is off unless asked for."""
    return Qwen2VLVideoProcessor(**kwargs)


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
            **text,
        },
        vision_config={"window_size": 112, "tokens_per_second": 2, **vision},
        tie_word_embeddings=tied,
        **IDS,
    )


def config(name: str) -> Qwen2_5_VLConfig:
    """A small config by name: tiny, tied, stress, deep, wide, wide_tied."""
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
    few = {"depth": 2, "out_hidden_size": 2048, "fullatt_block_indexes": [1]}
    deep = {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}
    parts = {
        "tiny": (tiny_vision, tiny_text, False),
        "tied": (tiny_vision, tiny_text, True),
        "stress": (tiny_vision, tiny_text, False),
        "deep": (tiny_vision | deep, tiny_text | {"num_hidden_layers": 36}, False),
        "wide": (published_vision | few, published_text | {"num_hidden_layers": 2}, False),
        "wide_tied": (published_vision | few, published_text | {"num_hidden_layers": 2}, True),
    }
    return _config(*copy.deepcopy(parts[name]))


@torch.no_grad()
def randomise(model: transformers.PreTrainedModel, seed: int, heavy_tails: bool = False) -> None:
    """Give every layer outputs of unit scale; with heavy tails, also a few huge channels.

    Heavy tails are Student's t with 3 degrees of freedom, and two residual channels that the
    layers push to about 100 times the others, as the massive activations of trained models.
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
        if heavy_tails and name.endswith("down_proj.weight"):
            parameter[:2] *= 100


@functools.lru_cache(maxsize=4)
def random_model(name: str, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A random-weight fp32 model on the CPU; shared between callers, so leave it as it is."""
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        config(name), attn_implementation="sdpa", dtype=torch.float32
    )
    model.tie_weights()
    randomise(model, seed, heavy_tails=name == "stress")
    return model.eval()


def load_model(
    folder: str, dtype: torch.dtype = torch.bfloat16
) -> Qwen2_5_VLForConditionalGeneration:
    """A real or saved checkpoint."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval()


def forward_kwargs(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs in their names, with our positions passed in (Qwen's rule, not this version's)."""
    kwargs = {
        "input_ids": inputs.tokens,
        "attention_mask": inputs.attention_mask,
        "position_ids": inputs.positions.permute(2, 0, 1),  # [3, b, s]
    }
    return kwargs | media_kwargs(inputs)


def media_kwargs(inputs: Inputs) -> dict[str, Tensor]:
    """Images and videos apart, as theirs takes them."""
    kwargs, names = {}, (("pixel_values", "image"), ("pixel_values_videos", "video"))
    pieces = inputs.pixel_values.split(inputs.grid_thw.prod(-1).tolist())
    for is_video, (values, kind) in enumerate(names):
        chosen = [k for k, video in enumerate(inputs.is_video) if video == bool(is_video)]
        if chosen:
            kwargs[values] = torch.cat([pieces[k] for k in chosen])
            kwargs[f"{kind}_grid_thw"] = inputs.grid_thw[chosen]
    return kwargs


def positions(model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> Tensor:
    """The positions this version of transformers computes by itself, [b, s, 3]."""
    grids = {k: v for k, v in media_kwargs(inputs).items() if k.endswith("grid_thw")}
    if inputs.seconds:
        grids["second_per_grid_ts"] = torch.tensor(inputs.seconds)
    if int(VERSION.split(".")[0]) >= 5:
        ids = model.config
        grids["mm_token_type_ids"] = (inputs.tokens == ids.image_token_id).int() + 2 * (
            inputs.tokens == ids.video_token_id
        ).int()
    ids, _ = model.model.get_rope_index(
        inputs.tokens, attention_mask=inputs.attention_mask, **grids
    )
    return ids.permute(1, 2, 0)  # [b, s, 3]


def window_order(grid_thw: list[tuple[int, int, int]]) -> tuple[Tensor, list[int]]:
    """Their window order and window lengths in patches, computed by their vision tower."""
    grids = torch.tensor(grid_thw)
    try:
        from transformers.vision_utils import get_vision_window_index
    except ImportError:  # transformers 4.57: a method of the tower
        order, bounds = random_model("tiny").model.visual.get_window_index(grids)
        bounds = torch.unique_consecutive(torch.tensor(bounds))
    else:
        order, bounds = get_vision_window_index(
            grids, spatial_merge_size=2, window_size=112, patch_size=14
        )
    return order, bounds.diff().tolist()


def patch_positions(grid_thw: list[tuple[int, int, int]]) -> Tensor:
    """Their row and column of every patch, [p, 2]."""
    grids = torch.tensor(grid_thw)
    try:
        from transformers.vision_utils import get_vision_position_ids
    except ImportError:  # transformers 4.57 has no function for it; its rotary angles tell
        angles = random_model("tiny").model.visual.rot_pos_emb(grids)  # [p, head_dim / 2]
        return angles[:, [0, angles.shape[1] // 2]].round().long()
    return get_vision_position_ids(grids, 2)
