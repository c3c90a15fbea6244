"""LLaVA's and QwenLM's rows: `conversations` of from and value, beside `image` and `video`."""

from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data.formats._shared import (
    conversations,
    listed,
    marks_of,
    parts_of,
    refuse_media,
    required,
    role_of,
    videos_of,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def parse_llava(row: dict[str, Any]) -> Conversation:
    r"""Parse one row::

        {"image": "a.jpg" | ["a.jpg", "b.jpg"],          (or "video")
         "conversations": [{"from": "human", "value": "<image>\nWhat is this?"},
                           {"from": "gpt", "value": "A red apple"}]}

    One newline before and one after a placeholder belong to it; all other text stays as it is.

    Source: qwen-vl-finetune/README.md of QwenLM.
    """
    refuse_media(row, "image", "video")
    turns = []
    for said in required(row, "conversations"):
        refuse_media(said)
        role = role_of(required(said, "from"), ROLES)
        parts = parts_of(required(said, "value"), role=role, join_newline=True)
        turns.append(Turn(role, parts, **marks_of(said, role)))
    images, videos = listed(row.get("image")), videos_of(row.get("video"))
    return Conversation(turns, images, videos, fps=row.get("fps"))


def llava_dataset(
    model_transform: Qwen25VLTransform, *, source: str, **options: Any
) -> SampleDataset:
    """Build a dataset of LLaVA's and QwenLM's conversations, with "image" or "video".

    Args:
        model_transform: tokenizer of the recipe
        source: .json or .jsonl file, or another that `open_rows` takes
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return conversations(model_transform, source, parse_llava, options)
