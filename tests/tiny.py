"""A model small enough for every test, with all its features, and batches for it."""

import torch
from torch import nn

from parity.inputs import LAYOUTS, Inputs, make_inputs
from torchtune_qwen25vl.model._component_builders import qwen2_5_vl
from torchtune_qwen25vl.model._decoder import Qwen25VL

IDS = {
    "image_token_id": 1001,
    "video_token_id": 1002,
    "vision_start_token_id": 1003,
    "vision_end_token_id": 1004,
}
SIZES = {
    "vocab_size": 1024,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 96,
    "max_seq_len": 4096,
    "norm_eps": 1e-6,
    "rope_base": 1e6,
    "mrope_section": (2, 3, 3),
    "tie_word_embeddings": False,
    "image_token_id": IDS["image_token_id"],
    "video_token_id": IDS["video_token_id"],
    "vision_num_layers": 2,
    "vision_num_heads": 2,
    "vision_embed_dim": 32,
    "vision_intermediate_dim": 60,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "full_attn_indices": (1,),
}


def model(**options) -> Qwen25VL:
    """A randomly initialised model in eval mode; options overrule sizes or tune it."""
    torch.manual_seed(0)
    built = qwen2_5_vl(**{**SIZES, **options})
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 1:  # norms and biases would otherwise be 1, 0 or too small
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("lora_b.weight"):  # 0 at first: an adapter without effect
                nn.init.normal_(parameter, std=0.05)
    for module in built.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    return built.eval()


def inputs(layout: str = "mixed batch", seed: int = 0) -> Inputs:
    """A batch of one of `parity.inputs.LAYOUTS`."""
    return make_inputs(LAYOUTS[layout], IDS, seed=seed)


def text(b: int, s: int, seed: int = 0) -> torch.Tensor:
    """Tokens that are no placeholders, [b, s]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (b, s), generator=generator)
