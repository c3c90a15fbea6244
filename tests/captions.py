"""A tiny model that says words, pictures for it, and the recipe as a function."""

import importlib
import json
from pathlib import Path

import numpy as np
import tiny_folder
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from torchtune_qwen25vl import _cli

IM_END = 151645
BYTES, NAMED = 256, 151643  # ids below are single bytes, ids from there on named tokens
SMALL = {
    "min_pixels": 3136,
    "max_pixels": 25088,
    "max_new_tokens": 12,
    "batch_size": 3,
    "device": "cpu",
    "workers": 0,
    "write_states": ["done", "cut", "looped"],
    "prompt": "What is on it?",
}


def write_model(folder: Path, *, ends: float = 1.2, **options) -> Path:
    """A random checkpoint whose answers are made of words, and end now and then; with 0 never."""
    tiny_folder.write_folder(folder, tied=False, **options)
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = weights["lm_head.weight"]
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8")).values()
    words = [token for token in vocabulary if BYTES <= token < NAMED]
    said = torch.zeros_like(head)
    said[words] = head[words]
    said[IM_END] = ends * head[IM_END]
    save_file({**weights, "lm_head.weight": said}, path, metadata={"format": "pt"})
    return folder


def write_pictures(folder: Path, count: int = 8, seed: int = 0) -> Path:
    """Pictures of noise of several sizes, so that captions differ."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        width, height = generator.integers(40, 220, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        pixels //= 1 + index % 3
        Image.fromarray(pixels).save(folder / f"picture {index:03}.png")
    return folder


def config(model: Path, inputs, **changes):
    """The recipe's config for a tiny model."""
    cfg = OmegaConf.load(_cli.RECIPES / "configs" / "caption.yaml")
    inputs = [str(inputs)] if isinstance(inputs, Path) else list(map(str, inputs))
    return OmegaConf.merge(cfg, {**SMALL, "model": str(model), "inputs": inputs, **changes})


recipe = importlib.import_module("torchtune_qwen25vl.recipes.caption")


def caption(model: Path, inputs, **changes) -> int:
    """Run the recipe here; its exit code."""
    torch.manual_seed(1)  # chance from outside must not matter
    return recipe.run(config(model, inputs, **changes))


def rows(output_dir: Path) -> list[dict]:
    """The table, in its order."""
    lines = (output_dir / "captions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def states(output_dir: Path) -> dict[str, str]:
    """State of every image by its file name."""
    return {Path(row["image"]).name: row["state"] for row in rows(output_dir)}


def texts(folder: Path) -> dict[str, str]:
    """What the text files of a folder hold, by their names."""
    return {path.name: path.read_text("utf-8") for path in folder.rglob("*.txt")}


def final_files(folder: Path) -> dict[str, bytes]:
    """What a run leaves for its user: everything but journal and lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("journal-0.jsonl") and path.name != "lock"
    }
