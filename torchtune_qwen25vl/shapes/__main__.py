"""`python -m torchtune_qwen25vl.shapes FOLDER`: images of shapes as files, to try things on."""

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

from torchtune_qwen25vl.shapes import QUESTION, Scene, draw, held_out_scenes


def main(words: list[str] | None = None) -> None:
    """Write images that no training has shown, 000.png and so on."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtune_qwen25vl.shapes",
        description="Draw images of shapes, none of which is in the training data of the example "
        "shapes_tiny.",
    )
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=200, help="how many (default: 200)")
    parser.add_argument(
        "--questions",
        action="store_true",
        help="also write questions.csv, a question about each image, with its answer, its first "
        "colour and shape, and a coin that has nothing to do with it",
    )
    asked = parser.parse_args(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    scenes = held_out_scenes(asked.count)
    for index, scene in enumerate(scenes):
        draw(scene).save(asked.folder / f"{index:03}.png")
    if asked.questions:
        _write_questions(asked.folder / "questions.csv", scenes)


def _write_questions(path: Path, scenes: Sequence[Scene]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image", "question", "answer", "colour", "shape", "coin"])
        for index, scene in enumerate(scenes):
            colour, shape = scene.attributes[1:] if scene.kind == "count" else scene.attributes[:2]
            coin = random.Random(f"coin {scene.seed}").choice(["heads", "tails"])
            name = f"{index:03}"
            writer.writerow([name, f"{name}.png", QUESTION, scene.caption, colour, shape, coin])


if __name__ == "__main__":
    main()
