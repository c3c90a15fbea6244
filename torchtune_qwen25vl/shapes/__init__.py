"""An example that learns: images of shapes drawn by a seeded generator, captioned by template.

    tune-qwen25vl run finetune --config shapes_tiny

trains a Qwen2.5-VL of 1.5 million parameters from nothing; `report` then says what its captions of
held-out images get right.
"""

from pathlib import Path

from torchtune_qwen25vl.shapes._captions import (
    blank,
    caption,
    held_out_scenes,
    share_right,
)
from torchtune_qwen25vl.shapes._dataset import QUESTION, ShapesDataset, caption_messages
from torchtune_qwen25vl.shapes._report import report
from torchtune_qwen25vl.shapes._scenes import Scene, draw, random_scene, score
from torchtune_qwen25vl.transform import Qwen25VLTransform


def tiny_folder() -> str:
    """Find config, tokenizer and pixel limits of the example's model, which has no weights yet."""
    return str(Path(__file__).parent / "tiny")


def tiny_transform() -> Qwen25VLTransform:
    """Make the transform of that folder."""
    return Qwen25VLTransform.from_folder(tiny_folder())


__all__ = [
    "QUESTION",
    "Scene",
    "ShapesDataset",
    "blank",
    "caption",
    "caption_messages",
    "draw",
    "held_out_scenes",
    "random_scene",
    "report",
    "score",
    "share_right",
    "tiny_folder",
    "tiny_transform",
]
