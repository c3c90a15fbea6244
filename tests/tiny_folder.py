"""A checkpoint small enough to train in seconds, and pictures to train it on.

The folder is laid out as the published ones are: flat config.json, safetensors, tokenizer and
processor. Its vocabulary is small but keeps Qwen's ids, so the embedding has 151,936 rows.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from parity import vocabulary
from torchtune_qwen25vl import Qwen25VLTransform, padded_collate, qwen2_5_vl_from_config, tune_to_hf
from torchtune_qwen25vl.data import llava_dataset
from torchtune_qwen25vl.weights._safetensors import write_weights

COLOURS = ("red", "green", "blue", "yellow")
SIZES = ((84, 56), (56, 112), (70, 98), (140, 84))  # width, height in pixels
QUESTION, ANSWER = "What is on it?", "A {} box on white."
ANSWERS = [ANSWER.format(colour) for colour in COLOURS]
TEXTS = (QUESTION, *ANSWERS, "You are a helpful assistant.", "user", "assistant")


def write_folder(
    folder: Path, *, tied: bool, nf4: bool = False, width: int = 32, **settings: Any
) -> Path:
    """Write a randomly initialised checkpoint, fp32.

    Args:
        folder: is made
        tied: whether the output is the embedding, as in 3B
        nf4: whether every linear layer of the decoder is to be whole blocks of NF4 (16,384 weights)
            on two processes too
        width: of the decoder, without `nf4`
        settings: of config.json, in place of what stands there
    """
    folder.mkdir(parents=True)
    config = _config(tied, 256 if nf4 else width) | settings
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    limits = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    for path in vocabulary.small(2 * TEXTS).iterdir():  # twice, so that whole words are merged
        shutil.copyfile(path, folder / path.name)
    torch.manual_seed(0)
    model = qwen2_5_vl_from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    weights = tune_to_hf(model.state_dict())
    write_weights(folder, weights, dict.fromkeys(weights, "model.safetensors"))
    return folder


def write_pictures(folder: Path, rows: int = 8) -> Path:
    """Write pictures of coloured boxes: in turn rows with one, with two, with none, with one."""
    folder.mkdir(parents=True)
    lines = []
    for row in range(rows):
        choice = row % len(COLOURS)
        media = (1, 2, 0, 1)[row % 4]
        names = [f"{row}-{i}.png" for i in range(media)]
        for i, name in enumerate(names):
            picture = Image.new("RGB", SIZES[(row + i) % len(SIZES)], "white")
            ImageDraw.Draw(picture).rectangle((14, 14, 40, 40), fill=COLOURS[choice])
            picture.save(folder / name)
        turns = [
            {"from": "human", "value": "<image>\n" * media + QUESTION},
            {"from": "gpt", "value": ANSWERS[choice]},
        ]
        lines.append({"conversations": turns} | ({"image": names} if names else {}))
    path = folder / "rows.json"
    path.write_text(json.dumps(lines))
    return path


def write_pairs(folder: Path, rows: int = 8) -> Path:
    """Write the same pictures and questions, each with its answer and one that is none."""
    conversations = json.loads(write_pictures(folder, rows).read_text())
    lines = []
    for line in conversations:
        asked, told = (turn["value"] for turn in line["conversations"])
        pair = {"prompt": asked, "chosen": told, "rejected": QUESTION, "image": line.get("image")}
        lines.append({key: value for key, value in pair.items() if value is not None})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def first_batch(folder: Path, rows: Path) -> dict[str, Any]:
    """What a recipe trains on first if it does not shuffle and takes two rows at a time."""
    dataset = llava_dataset(Qwen25VLTransform.from_folder(folder), source=str(rows))
    return padded_collate([dataset[0], dataset[1]], padding_idx=151643)


def _config(tied: bool, width: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": 151936,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": _sections(width // 4)},
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 60,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "in_chans": 3,
            "hidden_act": "silu",
        },
    }


def _sections(head_dim: int) -> list[int]:
    """Frequencies of a head shared out as in the published models, about 2 : 3 : 3."""
    space = 3 * head_dim // 16
    return [head_dim // 2 - 2 * space, space, space]
