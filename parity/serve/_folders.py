"""Folders that this project writes, as people serve them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from parity import photos
from parity.random_folder import WIDE_TEXT, WIDE_VISION, write_random
from parity.serve._deviations import REFUSALS
from torchtune_qwen25vl.media import cache_folder
from torchtune_qwen25vl.recipes import caption

TEXT = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "vocab_size": 384,
}
VISION = {"depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 108}
SAMPLES = 8


@dataclass(frozen=True)
class Served:
    """A folder to ask about.

    Attributes:
        name: in a few words
        folder: the model
        dtype: that vLLM computes in
        adapter: a PEFT folder that vLLM puts on it
        ours: the folder that ours answers from, where an adapter is merged
        refused: questions that vLLM ends with an error of its own, see `REFUSALS`
    """

    name: str
    folder: Path
    dtype: str = "float32"
    adapter: Path | None = None
    ours: Path | None = None
    refused: tuple[str, ...] = ()


def write_folders(scratch: Path) -> Iterator[Served]:
    """Write every folder but the trained one, each when it is asked for."""
    tiny = _random(scratch / "tied", TEXT)
    yield Served("random, tied", tiny)
    yield Served(
        "random, untied", _random(scratch / "untied", TEXT | {"tie_word_embeddings": False})
    )
    yield Served(
        "random, vocabulary of 448", _random(scratch / "resized", TEXT | {"vocab_size": 448})
    )
    rounded = _random(scratch / "bf16", TEXT, dtype=torch.bfloat16)
    yield Served("random, bf16", rounded, dtype="bfloat16")
    wide = limit_videos(write_random(scratch / "wide", text=WIDE_TEXT, vision=WIDE_VISION))
    yield Served("3B width, 2 + 2 layers", wide)
    yield Served("3B width, 2 + 2 layers, bf16", wide, dtype="bfloat16")
    data = _write_data(scratch / "data")
    merged = _train(tiny, scratch / "merged", data, vision="lora")
    yield Served("LoRA of decoder and vision, merged", merged)
    for name, vision in (("decoder", "frozen"), ("decoder and vision", "lora")):
        folder = scratch / f"adapter of {name}"
        adapter = _train(tiny, folder, data, vision=vision, save="adapter")
        merged = _train(tiny, folder.with_name(f"{folder.name}, merged"), data, vision=vision)
        refused = tuple(REFUSALS) if vision == "lora" else ()
        yield Served(f"PEFT adapter of {name}", tiny, adapter=adapter, ours=merged, refused=refused)


def _random(folder: Path, text: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    return limit_videos(write_random(folder, text=text, vision=VISION, dtype=dtype))


def limit_videos(folder: Path) -> Path:
    """Give videos the limits of images in words, see the deviation; return the folder."""
    images = json.loads((folder / "preprocessor_config.json").read_text())
    size = {"shortest_edge": images["min_pixels"], "longest_edge": images["max_pixels"]}
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "size": size}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return folder


def _write_data(folder: Path) -> Path:
    """A few images with captions, to train on."""
    folder.mkdir()
    rows = []
    for index in range(SAMPLES):
        photo = photos.photo(photos.PHOTOS[index % len(photos.PHOTOS)]).convert("RGB")
        photo.resize((112 + 28 * index, 112)).save(folder / f"{index}.png")
        question = {"from": "human", "value": "<image>\nWhat is this?"}
        answer = {"from": "gpt", "value": f"A {('red', 'blue')[index % 2]} square."}
        rows.append({"image": f"{index}.png", "conversations": [question, answer]})
    table = folder / "train.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def _train(base: Path, out: Path, data: Path, *, vision: str, save: str = "model") -> Path:
    """Train adapters by the recipe for two epochs, at rates that move the answers."""
    rate = {"lr": 1e-2, "weight_decay": 0.0}
    limits = json.loads((base / "preprocessor_config.json").read_text())
    cfg = OmegaConf.load(caption.CONFIG.with_name("finetune_lora.yaml"))
    assert isinstance(cfg, DictConfig)
    cfg.parts = {
        "vision": {"train": vision, **(rate if vision == "lora" else {})},
        "merger": {"train": "frozen"},
        "decoder": {"train": "lora", **rate},
    }
    changes = {
        "model_dir": str(base),
        "output_dir": str(out),
        "dataset": {"source": str(data)},
        "tokenizer": {name: limits[name] for name in ("min_pixels", "max_pixels")},
        "adapters": {"lora_rank": 4, "lora_alpha": 3},
        "gradient_accumulation_steps": 1,
        "epochs": 2,
        "device": "cpu",
        "precision": "fp32",
        "dataloader": {"num_workers": 0},
        "enable_activation_checkpointing": False,
        "save": save,
    }
    path = out.with_suffix(".yaml")
    OmegaConf.save(OmegaConf.merge(cfg, changes), path)
    _finetune(str(path))
    return out / save


def trained_folder() -> Path:
    """Return the model that `shapes_tiny` trains; the first call trains it, in minutes."""
    model = cache_folder("shapes_tiny") / "model"
    if not model.is_dir():
        _finetune("shapes_tiny", f"output_dir={model.parent}")
    return model


def _finetune(config: str, *words: str) -> None:
    command = [sys.executable, "-m", "torchtune_qwen25vl._cli", "run", "finetune"]
    subprocess.run([*command, "--config", config, *words], check=True)
