"""ShareGPT's rows, named as LLaMA-Factory names them: a conversation beside lists of media::

{"conversations": [{"from": "human", "value": "<image>Who are they?"},
                   {"from": "gpt", "value": "..."}],
 "images": ["a.jpg"], "videos": [], "system": "...", "tools": "[...]"}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data.formats._shared import (
    calls_of,
    conversations,
    listed,
    marks_of,
    override,
    parts_of,
    refuse_media,
    required,
    role_of,
    tools_of,
    videos_of,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform

CALL = "call"  # a speaker of its own in these formats: the assistant calling a tool
COLUMNS = ("images", "videos", "system", "tools", "objects")
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class ConversationParser:
    """The parser of rows whose texts mark places for media listed beside them.

    Attributes:
        columns: columns of "messages", "images", "videos", "system", "tools" and "objects"
        role_key: key of a message's speaker
        content_key: key of its text
        roles: torchtune's roles, or `CALL`, by the format's names of the speakers
    """

    columns: Mapping[str, str]
    role_key: str
    content_key: str
    roles: Mapping[str, str]

    def __call__(self, row: dict[str, Any]) -> Conversation:
        if row.get("audios"):
            raise ValueError("the row holds audios, which Qwen2.5-VL cannot hear")
        refuse_media(row, self.columns["images"], self.columns["videos"])
        said = required(row, self.columns["messages"])
        turns = [turn for message in said for turn in self._turns(message)]
        if system := row.get(self.columns["system"]):
            turns.insert(0, Turn("system", [{"type": "text", "content": system}]))
        return Conversation(
            turns,
            images=listed(row.get(self.columns["images"])),
            videos=videos_of(row.get(self.columns["videos"])),
            fps=row.get("fps"),
            objects=row.get(self.columns["objects"]),
            tools=tools_of(row.get(self.columns["tools"])),
        )

    def _turns(self, message: Mapping[str, Any]) -> list[Turn]:
        refuse_media(message)
        role = role_of(required(message, self.role_key), self.roles)
        content = required(message, self.content_key)
        if role == CALL:
            return list(calls_of(content, **marks_of(message, "assistant")))
        return [Turn(role, parts_of(content, role=role), **marks_of(message, role))]


def sharegpt_parser(
    columns: Mapping[str, str] | None = None, tags: Mapping[str, str] | None = None
) -> ConversationParser:
    """Make a parser by the names of LLaMA-Factory's `dataset_info.json`.

    Args:
        columns: columns that are not called conversations (for "messages"), images, videos, system,
            tools or objects
        tags: those of `role_tag`, `content_tag`, `user_tag`, `assistant_tag`, `observation_tag`,
            `function_tag` and `system_tag` that are not ShareGPT's

    Raises:
        ValueError: if a column or tag is not one of these.
    """
    known = {"messages": "conversations", **{name: name for name in COLUMNS}}
    names = override(SHAREGPT_TAGS, tags or {})
    return ConversationParser(
        columns=override(known, columns or {}),
        role_key=names["role_tag"],
        content_key=names["content_tag"],
        roles={
            names["system_tag"]: "system",
            names["user_tag"]: "user",
            names["assistant_tag"]: "assistant",
            names["observation_tag"]: "ipython",
            names["function_tag"]: CALL,
        },
    )


def sharegpt_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of ShareGPT's conversations beside "images" and "videos".

    Args:
        model_transform: tokenizer of the recipe
        source: .json or .jsonl file, or another that `open_rows` takes
        columns: columns of "messages", "images", "videos", "system", "tools" and "objects", as in
            `dataset_info.json`; messages are in "conversations" by default
        tags: as in `dataset_info.json`, `role_tag`, `content_tag`, `user_tag`, `assistant_tag`,
            `observation_tag`, `function_tag`, `system_tag`
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return conversations(model_transform, source, sharegpt_parser(columns, tags), options)
