"""Rows of preference in the public formats: a prompt with two answers, or with one and a mark.

In every format "rejected_images" are the images that the rejected answer sees in place of the
row's.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data._preference import Preference, preference_rows
from torchtune_qwen25vl.data.formats._openai import turns_of_parts
from torchtune_qwen25vl.data.formats._shared import (
    MEDIA_COLUMNS,
    listed,
    media_of,
    opened,
    parts_of,
    refuse_media,
    required,
    tools_of,
)
from torchtune_qwen25vl.data.formats._sharegpt import ConversationParser, sharegpt_parser
from torchtune_qwen25vl.data.formats._swift import swift_parser
from torchtune_qwen25vl.transform import Qwen25VLTransform

REJECTED_IMAGES = "rejected_images"
UNREAD = ("rejected_image", "rejected_videos", "rejected_video", "chosen_images", "chosen_image")


def parse_hf_preference(row: dict[str, Any]) -> Preference:
    """Parse one row as TRL has them, messages or texts, media in columns beside them::

    {"images": [...], "prompt": [messages], "chosen": [messages], "rejected": [messages]}
    {"images": [...], "chosen": [whole conversation], "rejected": [whole conversation]}
    {"images": [...], "prompt": [messages], "completion": [messages], "label": true}
    """
    refuse_media(row, *MEDIA_COLUMNS)
    prompt = turns_of_parts(row["prompt"], "user") if row.get("prompt") is not None else []
    asked = Conversation(prompt, **media_of(row), tools=tools_of(row.get("tools")))
    if row.get("completion") is not None:
        answer = turns_of_parts(row["completion"], "assistant")
        return _unpaired(row, "label", replace(asked, turns=[*prompt, *answer]))
    answers = [turns_of_parts(required(row, key), "assistant") for key in ("chosen", "rejected")]
    return _pair(row, *(replace(asked, turns=[*prompt, *turns]) for turns in answers))


def parse_plain_preference(row: dict[str, Any]) -> Preference:
    r"""Parse one row of plain texts, as 2U1's, RLAIF-V's, RLHF-V's and MM-RLHF's are::

        {"image": "a.jpg" | [...], "prompt": "<image>\nWhat?", "chosen": "...", "rejected": "..."}
        {"image": "a.jpg", "question": "What is it?", "chosen": "...", "rejected": "..."}
        {"image": "a.jpg", "text": "{\"question\": ..., \"chosen\": ..., \"rejected\": ...}"}
        {"image": "a.jpg", "prompt": "What is it?", "completion": "...", "label": true}

    Media whose place the prompt does not mark come before it. "system" is a system prompt.
    """
    refuse_media(row, *MEDIA_COLUMNS)
    if "chosen" not in row and isinstance(row.get("text"), str):
        row = {**row, **json.loads(row["text"])}
    columns = media_of(row)
    question = required(row, "question" if row.get("prompt") is None else "prompt")
    parts = parts_of(question, role="user", join_newline=True)
    if not any(part["content"] is None for part in parts):
        kinds = ["image"] * len(columns["images"]) + ["video"] * len(columns["videos"])
        parts = [*({"type": kind, "content": None} for kind in kinds), *parts]
    turns = [Turn("system", parts_of(row["system"], role="system"))] if row.get("system") else []
    turns.append(Turn("user", parts))

    def answered(key: str) -> Conversation:
        answer = parts_of(required(row, key), role="assistant")
        return Conversation([*turns, Turn("assistant", answer)], **columns)

    if row.get("completion") is not None:
        return _unpaired(row, "label", answered("completion"))
    return _pair(row, answered("chosen"), answered("rejected"))


@dataclass(frozen=True)
class ShareGptPreferenceParser:
    """The parser of LLaMA-Factory's rows of preference.

    Attributes:
        conversation: parser of the conversation
        chosen: column of the chosen answer, a message
        rejected: column of the rejected one
        kto_tag: column that says whether the last answer of the conversation was liked
    """

    conversation: ConversationParser
    chosen: str
    rejected: str
    kto_tag: str

    def __call__(self, row: dict[str, Any]) -> Preference:
        if row.get(self.kto_tag) is not None:
            return _unpaired(row, self.kto_tag, self.conversation(row))
        column = self.conversation.columns["messages"]
        said = required(row, column)
        answers = [required(row, key) for key in (self.chosen, self.rejected)]
        return _pair(row, *(self.conversation({**row, column: [*said, a]}) for a in answers))


@dataclass(frozen=True)
class SwiftPreferenceParser:
    """The parser of ms-swift's rows of preference.

    Attributes:
        conversation: parser of the conversation that ends with the chosen answer
    """

    conversation: ConversationParser

    def __call__(self, row: dict[str, Any]) -> Preference:
        own = self.conversation(row)
        if row.get("label") is not None:
            return _unpaired(row, "label", own)
        if row.get("rejected_messages") is not None:
            column = self.conversation.columns["messages"]
            return _pair(row, own, self.conversation({**row, column: row["rejected_messages"]}))
        text = parts_of(required(row, "rejected_response"), role="assistant")
        return _pair(row, own, replace(own, turns=[*own.turns[:-1], Turn("assistant", text)]))


def hf_preference_dataset(
    model_transform: Qwen25VLTransform, *, source: str, **options: Any
) -> SampleDataset:
    """Build a dataset of "prompt", "chosen" and "rejected", or of "completion" and "label", of TRL.

    Args:
        model_transform: tokenizer of the recipe
        source: a folder of `save_to_disk`, a .parquet file, a hub id, or another that `open_rows`
            takes
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _preferences(model_transform, source, parse_hf_preference, options)


def preference_dataset(
    model_transform: Qwen25VLTransform, *, source: str, **options: Any
) -> SampleDataset:
    """Build a dataset of plain texts, "prompt" or "question", "chosen" and "rejected", and "image".

    Args:
        model_transform: tokenizer of the recipe
        source: .jsonl, .json, .csv or .parquet file, or another that `open_rows` takes
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _preferences(model_transform, source, parse_plain_preference, options)


def sharegpt_preference_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of LLaMA-Factory's conversations with "chosen" and "rejected", or "kto_tag".

    Args:
        model_transform: tokenizer of the recipe
        source: .json or .jsonl file, or another that `open_rows` takes
        columns: columns of "chosen", "rejected", "kto_tag" and those of `sharegpt_dataset`, as in
            `dataset_info.json`
        tags: as in `sharegpt_dataset`
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    given = dict(columns or {})
    own = {key: given.pop(key, key) for key in ("chosen", "rejected", "kto_tag")}
    parser = ShareGptPreferenceParser(sharegpt_parser(given, tags), **own)
    return _preferences(model_transform, source, parser, options)


def swift_preference_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of ms-swift's messages with "rejected_response" or "rejected_messages".

    Or, for rows of one answer, with "label".

    Args:
        model_transform: tokenizer of the recipe
        source: .jsonl or .json file, or another that `open_rows` takes
        columns: as in `swift_dataset`
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    parser = SwiftPreferenceParser(swift_parser(columns))
    return _preferences(model_transform, source, parser, options)


def _preferences(
    model_transform: Qwen25VLTransform,
    source: str,
    parse: Callable[[dict[str, Any]], Preference],
    options: Mapping[str, Any],
) -> SampleDataset:
    rows, common = opened(source, options)
    split = options.get("split")
    return preference_rows(model_transform, rows, parse, source=source, split=split, **common)


def _pair(row: Mapping[str, Any], chosen: Conversation, rejected: Conversation) -> Preference:
    """Make a pair, whose rejected answer may have images of its own.

    Raises:
        ValueError: if the row has media of one answer under another key than "rejected_images", or
            a mark of an answer alone.
    """
    if unread := [key for key in UNREAD if row.get(key)]:
        raise ValueError(
            f"media of one answer alone stand under {REJECTED_IMAGES}, but there is "
            f"{', '.join(unread)}; rename it"
        )
    if row.get(REJECTED_IMAGES) is not None:
        rejected = replace(rejected, images=listed(row[REJECTED_IMAGES]))
    return Preference((chosen, rejected))


def _unpaired(row: Mapping[str, Any], mark: str, answer: Conversation) -> Preference:
    """Make a row of one answer, marked by whether it was liked.

    Raises:
        ValueError: if the mark is not true or false, or there is a rejected answer too.
    """
    if row[mark] not in (True, False):
        raise ValueError(f"{mark!r} is true or false, got {row[mark]!r}")
    if other := [key for key in row if key.startswith("rejected") and row[key]]:
        raise ValueError(
            f"a row is a pair, or one answer with {mark!r}, but there is {', '.join(other)} too"
        )
    return Preference((answer,), liked=bool(row[mark]))
