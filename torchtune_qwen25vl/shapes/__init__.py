"""An example that learns: images of shapes drawn by a seeded generator, captioned by template.

    tune-qwen25vl run finetune --config shapes_tiny

trains a Qwen2.5-VL of 1.5 million parameters from nothing; `report` then says what its captions of
held-out images get right.
"""

import json
import shutil
from pathlib import Path

from torchtune_qwen25vl._files import replacing_folder
from torchtune_qwen25vl.shapes._captions import (
    blank,
    caption,
    held_out_scenes,
    share_right,
)
from torchtune_qwen25vl.shapes._dataset import (
    QUESTION,
    ShapesDataset,
    ShapesPairs,
    attributes_right,
    caption_messages,
)
from torchtune_qwen25vl.shapes._report import report
from torchtune_qwen25vl.shapes._scenes import Scene, draw, one_wrong, random_scene, score
from torchtune_qwen25vl.transform import Qwen25VLTransform


def tiny_folder() -> str:
    """Find config, tokenizer and pixel limits of the example's model, which has no weights yet."""
    return str(Path(__file__).parent / "tiny")


def smaller_folder(folder: str) -> str:
    """Write the same for a model of a third of the parameters; return where."""
    target = Path(folder)
    if not target.exists():
        with replacing_folder(target) as made:
            for path in Path(tiny_folder()).iterdir():
                shutil.copyfile(path, made / path.name)
            config = json.loads((made / "config.json").read_text())
            config |= {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 176}
            config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
            config["vision_config"] |= {"out_hidden_size": 64}
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def tiny_transform() -> Qwen25VLTransform:
    """Make the transform of that folder."""
    return Qwen25VLTransform.from_folder(tiny_folder())


__all__ = [
    "QUESTION",
    "Scene",
    "ShapesDataset",
    "ShapesPairs",
    "attributes_right",
    "blank",
    "caption",
    "caption_messages",
    "draw",
    "held_out_scenes",
    "one_wrong",
    "random_scene",
    "report",
    "score",
    "share_right",
    "smaller_folder",
    "tiny_folder",
    "tiny_transform",
]
