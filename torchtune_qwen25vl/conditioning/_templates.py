"""The three ways in which Qwen-Image's pipelines ask their text encoder.

Texts and sizes are those that the weights were trained with; diffusers 0.42.1
(pipelines/qwenimage), ComfyUI and DiffSynth-Studio have the same texts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torchtune.data import Message

Task = Literal["text_to_image", "edit", "edit_plus"]
SIDE = 32  # pixels of which the sides of a resized image are multiples

_DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:"
)
_EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate."
)


def sized(width: int, height: int, area: int) -> tuple[int, int]:
    """Return the size of this shape whose area is about `area`, in whole multiples of `SIDE`."""
    ratio = width / height
    across = math.sqrt(area * ratio)
    return _whole(across), _whole(across / ratio)


def _whole(side: float) -> int:
    return max(round(side / SIDE), 1) * SIDE


@dataclass(frozen=True)
class Template:
    """How one task asks.

    Attributes:
        system: what the system says
        label: stands before each image, with {} for its number
        images: least and most images of a prompt; None is any number
        area: pixels to which an image is resized, its shape kept
    """

    system: str
    label: str = ""
    images: tuple[int, int | None] = (0, 0)
    area: int = 0

    def messages(
        self, prompt: str, images: Sequence[Image.Image], *, markup: bool
    ) -> list[Message]:
        """Return what is asked, an image being a PIL image.

        Args:
            prompt: text of the user
            images: of the user, as the processor is to see them
            markup: whether names of Qwen's tokens in the prompt are those tokens
        """
        content: list[dict[str, Any]] = []
        for number, image in enumerate(images, 1):
            if self.label:
                content.append({"type": "text", "content": self.label.format(number)})
            content.append({"type": "image", "content": image})
        content.append({"type": "text", "content": prompt, "markup": markup})
        return [Message("system", self.system), Message("user", content)]

    def resized(self, image: Image.Image) -> Image.Image:
        """Resize an image as the task's pipeline does, before the processor resizes it again."""
        size = sized(image.width, image.height, self.area)
        return image.resize(size, Image.Resampling.LANCZOS)


TEMPLATES: Mapping[Task, Template] = {
    "text_to_image": Template(_DESCRIBE),
    "edit": Template(_EDIT, images=(1, 1), area=1024 * 1024),
    "edit_plus": Template(_EDIT, "Picture {}: ", images=(0, None), area=384 * 384),
}


def template_of(task: Task) -> Template:
    """Return the template of a task.

    Raises:
        ValueError: if there is no such task.
    """
    if task not in TEMPLATES:
        raise ValueError(f"task is one of {', '.join(TEMPLATES)}, got {task!r}")
    return TEMPLATES[task]
