"""What the model of shapes_tiny learned: in numbers, and against transformers token for token."""

import json
import os
from pathlib import Path

import torch
from PIL import Image

from parity import reference
from torchtune_qwen25vl import load_pretrained, shapes

SEED = 1_000_003  # no training seed


def report(folder: Path, seconds: float, *, pictures: int = 500) -> dict[str, float | bool]:
    """Caption held-out pictures with the trained folder and write shapes-report.json beside it.

    Holds `attributes`, the share named exactly right; `attributes_blank`, the same with blank
    pictures; `attributes_constant`, that of the luckiest single caption, which is what chance
    reaches; `transformers_equal`, whether transformers says the same, token for token; `seconds`.
    """
    model, transform = load_pretrained(folder)
    scenes = shapes.held_out_scenes(pictures, SEED)
    images = shapes.pictures(scenes)
    ours = shapes.caption(model, transform, images)
    unseen = shapes.caption(model, transform, [shapes.blank(image) for image in images])
    captions = [scene.caption for scene in scenes]
    result = {
        "attributes": shapes.share_right([transform.decode(c) for c in ours], scenes),
        "attributes_blank": shapes.share_right([transform.decode(c) for c in unseen], scenes),
        "attributes_constant": max(
            shapes.share_right([said] * len(scenes), scenes) for said in set(captions)
        ),
        "transformers_equal": _theirs(folder, images) == ours,
        "seconds": seconds,
    }
    target = folder.parent / "shapes-report.json"
    written = target.with_suffix(".tmp")
    written.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(written, target)
    return result


def _theirs(folder: Path, images: list[Image.Image]) -> list[list[int]]:
    """Greedy captions by transformers, from the folder alone: its processor, its generate."""
    model = reference.load(str(folder), torch.float32)
    processor = reference.processor(folder)
    return [reference.answer(model, processor, shapes.QUESTION, image) for image in images]
