"""A table of questions with references, and the recipe evaluate as a function."""

import importlib
import json
from pathlib import Path

import captions
from omegaconf import OmegaConf

recipe = importlib.import_module("torchtune_qwen25vl.recipes.evaluate")
SMALL = {
    "min_pixels": 3136,
    "max_pixels": 25088,
    "max_new_tokens": 6,
    "batch_size": 3,
    "device": "cpu",
    "workers": 0,
    "prompt": "{question}",
    "metrics": ["anls", "exact_match", "cider"],
}
ASKED = ("What is on it?", "What colour is the box?", "Is there anything else to see in it at all?")


def write_rows(path: Path, rows) -> Path:
    """A .jsonl of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(folder: Path, count: int = 7) -> Path:
    """A table with pictures beside it."""
    captions.write_pictures(folder / "images", count)
    rows = [
        {
            "question_id": f"q{k}",
            "image": f"images/picture {k:03}.png",
            "question": ASKED[k % 3],
            "answer": ["A red box on white.", "box"] if k % 2 else "What is on it",
            "choices": ["cat", "dog", "box"],
            "letter": "ABC"[k % 3],
        }
        for k in range(count)
    ]
    return write_rows(folder / "table.jsonl", rows)


def run(model, table, **changes) -> int:
    """Run the recipe here; its exit code."""
    cfg = OmegaConf.load(recipe.CONFIG)
    keys = {"model": str(model), "source": str(table)}
    return recipe.run(OmegaConf.merge(cfg, {**SMALL, **keys, **changes}))


def predictions(folder: Path) -> list[dict]:
    """The rows that a run leaves."""
    lines = (folder / "predictions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def scores(folder: Path) -> dict:
    """What a run came to."""
    return json.loads((folder / "scores.json").read_text("utf-8"))


def final(folder: Path) -> dict[str, bytes]:
    """What a run leaves for its user."""
    names = ("predictions.jsonl", "scores.json", "page.html")
    return {name: (folder / name).read_bytes() for name in names}
