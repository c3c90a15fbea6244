"""Checkpoints of random weights as folders: what a program that takes a folder is tried on."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from parity import reference, vocabulary
from torchtune_qwen25vl import qwen2_5_vl_from_config, tune_to_hf
from torchtune_qwen25vl._weight_files import write_weights

QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "eos_token_id": 151645,
}
ENDS = [151643, 151645]


def write_random(
    folder: Path, *, text: dict[str, Any], vision: dict[str, Any], dtype: torch.dtype
) -> Path:
    """A tied model with Qwen's ids and vocabulary size, outputs of unit scale, that never ends.

    Args:
        folder: is made
        text: sizes of the decoder, on top of those of the tiny model
        vision: sizes of the vision tower, likewise
        dtype: of the weights
    """
    folder.mkdir(parents=True)
    config = reference.config("tiny, 3B's vocabulary").to_dict() | QWEN_IDS
    config["text_config"] |= {"eos_token_id": QWEN_IDS["eos_token_id"], **text}
    config["vision_config"] |= {"out_hidden_size": config["text_config"]["hidden_size"], **vision}
    config["text_config"].pop("layer_types", None)  # follow from the number of layers
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text("{}")
    for path in vocabulary.small(("a photo of",)).iterdir():
        shutil.copy(path, folder)
    model = qwen2_5_vl_from_config(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
        model.tok_embeddings.weight[ENDS] = 0
    weights = {name: weight.to(dtype) for name, weight in tune_to_hf(model.state_dict()).items()}
    write_weights(folder, weights, dict.fromkeys(weights, "model.safetensors"))
    return folder


def rope(head_dim: int) -> dict[str, Any]:
    """Frequencies of a head shared out as in the published models, 1 : 1.5 : 1.5."""
    sections = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    values = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return {"rope_parameters": values, "rope_scaling": values}  # the latter before transformers 5
