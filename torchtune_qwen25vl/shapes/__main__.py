"""`python -m torchtune_qwen25vl.shapes FOLDER`: images of shapes as files, to try things on."""

import argparse
from pathlib import Path

from torchtune_qwen25vl.shapes import draw, held_out_scenes


def main(words: list[str] | None = None) -> None:
    """Write images that no training has shown, 000.png and so on."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtune_qwen25vl.shapes",
        description="Draw images of shapes, none of which is in the training data of the example "
        "shapes_tiny.",
    )
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--count", type=int, default=200, help="how many (default: 200)")
    asked = parser.parse_args(words)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(held_out_scenes(asked.count)):
        draw(scene).save(asked.folder / f"{index:03}.png")


if __name__ == "__main__":
    main()
