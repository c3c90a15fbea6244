"""Rows of HF datasets as TRL takes them: messages of parts, media in columns beside them::

    {"images": [...],
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "..."}]}]}
    {"images": [...], "prompt": [messages or a text], "completion": [messages or a text]}

The columns are `image`, `images`, `video` and `videos`.
"""

from dataclasses import replace
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data.formats._openai import turns_of_parts
from torchtune_qwen25vl.data.formats._shared import (
    MEDIA_COLUMNS,
    conversations,
    media_of,
    refuse_media,
    required,
    tools_of,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform


def parse_hf(row: dict[str, Any]) -> Conversation:
    """Parse one row with media in columns; only a completion is trained on, not its prompt."""
    refuse_media(row, *MEDIA_COLUMNS)
    if row.get("messages") is not None:
        turns = turns_of_parts(row["messages"], "user")
    else:
        prompt = turns_of_parts(required(row, "prompt"), "user")
        turns = [replace(turn, trained=False) for turn in prompt]
        turns += turns_of_parts(required(row, "completion"), "assistant")
    return Conversation(turns, **media_of(row), tools=tools_of(row.get("tools")))


def hf_dataset(model_transform: Qwen25VLTransform, *, source: str, **options: Any) -> SampleDataset:
    """Build a dataset of "messages", or "prompt" and "completion", with media in columns.

    Args:
        model_transform: tokenizer of the recipe
        source: a folder of `save_to_disk`, a .parquet file, a hub id, or another that `open_rows`
            takes
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return conversations(model_transform, source, parse_hf, options)
