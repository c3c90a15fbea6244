"""Scenes as torchtune datasets: drawn when asked for, the same for the same seed and index."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchtune.data import Message
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms import Transform

from torchtune_qwen25vl.shapes._scenes import Scene, draw, one_wrong, random_scene, score

QUESTION = "What is this?"


def caption_messages(image: Image.Image, caption: str | None = None) -> list[Message]:
    """Make the conversation about one image; without a caption, the question alone."""
    parts = [{"type": "image", "content": image}, {"type": "text", "content": QUESTION}]
    messages = [Message("system", ""), Message("user", parts)]
    return messages if caption is None else [*messages, Message("assistant", caption)]


class ShapesDataset(Dataset):
    """Images of shapes with their captions.

    Labels are made by the installed torchtune (0.6.1 shifts them in its recipes, later versions
    here).

    Args:
        transform: messages to samples, `Qwen25VLTransform`
        length: how many images
        seed: image k is that of scene seed * 2**32 + k, so that seeds never share one
    """

    def __init__(self, transform: Transform, *, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self._transform = transform
        self._label = SFTTransform(model_transform=transform)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        scene = self._scene(index)
        return self._captioned(scene, scene.caption)

    def prompt(self, index: int) -> dict[str, Any]:
        """Return the question about an image, for `attributes_right` with the scene it shows."""
        scene = self._scene(index)
        asked = self._transform({"messages": caption_messages(draw(scene))}, inference=True)
        row = {"scene": scene.seed}
        return {**asked, "prompt": QUESTION, "reference": scene.caption, "row": row}

    def _scene(self, index: int) -> Scene:
        return random_scene((self.seed << 32) + index)

    def _captioned(self, scene: Scene, caption: str) -> dict[str, Any]:
        return dict(self._label({"messages": caption_messages(draw(scene), caption)}))


class ShapesPairs(ShapesDataset):
    """Images of shapes with their caption, and one that has an attribute wrong."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        scene = self._scene(index)
        rejected = self._captioned(scene, one_wrong(scene).caption)
        return {**self._captioned(scene, scene.caption), "rejected": rejected}


def attributes_right() -> Callable[[str, str, Mapping[str, Any]], float]:
    """Make a reward for the recipe policy: the share of an image's attributes that are named."""

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        scene = random_scene(row["scene"])
        return score(answer, scene) / len(scene.attributes)

    return reward
