"""Checkpoints of random weights as folders: what a program that takes a folder is tried on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from torchtune_qwen25vl import qwen2_5_vl_from_config, shapes, tune_to_hf
from torchtune_qwen25vl.weights import write_weights

WIDE_TEXT = {  # as wide as 3B, and few layers
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
}
WIDE_VISION = {"depth": 2, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
FIRST_WORD, FIRST_NAMED = 256, 359  # ids of the tiny vocabulary: before words come single bytes


def write_random(
    folder: Path,
    *,
    text: dict[str, Any],
    vision: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a tied model with outputs of unit scale, which says words and never ends.

    Args:
        folder: is made
        text: sizes of the decoder, on top of those of the tiny model of `shapes`
        vision: sizes of the vision tower, likewise
        dtype: of the weights
    """
    shutil.copytree(shapes.tiny_folder(), folder)
    config = json.loads((folder / "config.json").read_text()) | text
    config["vision_config"] |= {"out_hidden_size": config["hidden_size"], **(vision or {})}
    config["rope_scaling"] = _rope(config["hidden_size"] // config["num_attention_heads"])
    (folder / "config.json").write_text(json.dumps(config))
    model = qwen2_5_vl_from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
        embedding = model.tok_embeddings.weight
        embedding[:FIRST_WORD] = embedding[FIRST_NAMED:] = 0  # a zero logit is never the largest
    weights = {name: weight.to(dtype) for name, weight in tune_to_hf(model.state_dict()).items()}
    write_weights(folder, weights, dict.fromkeys(weights, "model.safetensors"))
    return folder


def _rope(head_dim: int) -> dict[str, Any]:
    """Frequencies of a head shared out as in the published models, 1 : 1.5 : 1.5."""
    sections = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    return {"type": "mrope", "mrope_section": sections}
