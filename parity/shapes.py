"""`python -m parity.shapes FOLDER`: does transformers caption images as shapes_tiny does?"""

import argparse
import sys
from pathlib import Path

import torch

from parity import reference
from torchtune_qwen25vl import load_pretrained, shapes


def differing(folder: Path, *, images: int = 500) -> int:
    """Caption held-out images by both sides, greedily, and count where they differ.

    Theirs knows the folder alone: its processor, its generate.
    """
    model, transform = load_pretrained(folder)
    their_model = reference.load(str(folder), torch.float32)
    processor = reference.processor(folder)
    drawn = [shapes.draw(scene) for scene in shapes.held_out_scenes(images)]
    ours = shapes.caption(model, transform, drawn)
    theirs = [reference.answer(their_model, processor, shapes.QUESTION, image) for image in drawn]
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


def main(words: list[str] | None = None) -> int:
    """Entry point: 0 if all captions are the same, else 1."""
    parser = argparse.ArgumentParser(prog="python -m parity.shapes", description=__doc__)
    parser.add_argument("folder", type=Path, help="such as runs/shapes_tiny/model")
    parser.add_argument("--images", type=int, default=500, help="how many (default: 500)")
    asked = parser.parse_args(words)
    count = differing(asked.folder, images=asked.images)
    print(f"{count} of {asked.images} captions differ from those of transformers")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
