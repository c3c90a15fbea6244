"""A tiny model, a table of questions about pictures, and the recipe as a function."""

import csv
import importlib
import json
from pathlib import Path

import captions
import numpy as np
from omegaconf import OmegaConf

from torchtune_qwen25vl.hidden_states import open_states

recipe = importlib.import_module("torchtune_qwen25vl.recipes.hidden_states")
SMALL = {
    "min_pixels": 3136,
    "max_pixels": 25088,
    "max_new_tokens": 4,
    "batch_size": 3,
    "device": "cpu",
    "workers": 0,
    "wanted": ["halp", "layer.0/query_mean"],
}
ASKED = ("What is on it?", "What colour is the box?", "Is there anything else to see in it at all?")


def write_table(folder: Path, count: int = 8, columns=None) -> Path:
    """A .csv of so many rows; `columns` makes more of the number of the row."""
    captions.write_pictures(folder / "images", count)
    with (folder / "questions.csv").open("w", newline="") as file:
        rows = [
            {
                "question_id": f"q{k}",
                "image_name": f"picture {k:03}.png",
                "question": ASKED[k % 3],
                "gt_answer": ("yes", "3.0", "")[k % 3],
                **(columns(k) if columns else {}),
            }
            for k in range(count)
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "questions.csv"


def run(model: Path, table: Path, **changes) -> int:
    """Run the recipe here; its exit code."""
    keys = {"model": str(model), "inputs": [str(table)], "images_dir": str(table.parent / "images")}
    cfg = OmegaConf.load(recipe.CONFIG)
    return recipe.run(OmegaConf.merge(cfg, {**SMALL, **keys, **changes}))


def entries(folder: Path) -> list[dict]:
    """The rows of the table that a run leaves."""
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text("utf-8").splitlines()]


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All states of a run, by selector."""
    states = open_states(folder)
    return {name: np.array(states[name]) for name in states.selectors}
