"""Scenes as a torchtune dataset: drawn when asked for, the same for the same seed and index."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch.utils.data import Dataset
from torchtune.data import Message
from torchtune.datasets._sft import SFTTransform
from torchtune.modules.transforms import Transform

from torchtune_qwen25vl.shapes._scenes import draw, random_scene

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
        self._label = SFTTransform(model_transform=transform)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        scene = random_scene((self.seed << 32) + index)
        messages = caption_messages(draw(scene), scene.caption)
        return self._label({"messages": messages})
