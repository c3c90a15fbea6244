"""Rows of a question and its answer, with those before it under "history".

Of alpaca, named as LLaMA-Factory names them, and of ms-swift::

    {"instruction": "<image>Describe it.", "input": "In one word.", "output": "An apple.",
     "history": [["What is it?", "Fruit."]], "system": "...", "images": ["a.jpg"]}
    {"query": "<image>Describe it.", "response": "An apple.", "history": [...], "system": "..."}
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data.formats._shared import (
    conversations,
    listed,
    override,
    parts_of,
    refuse_media,
    required,
    tools_of,
    videos_of,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform

COLUMNS = ("history", "system", "images", "videos", "tools", "objects")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}


@dataclass(frozen=True)
class QueryParser:
    """The parser of rows of one question and its answer.

    Attributes:
        columns: columns of "prompt" and "response", of `COLUMNS`, and where there is one, of
            "query", a text that follows the prompt on a line of its own
    """

    columns: Mapping[str, str]

    def __call__(self, row: dict[str, Any]) -> Conversation:
        refuse_media(row, self.columns["images"], self.columns["videos"])
        return Conversation(
            list(self._turns(row)),
            images=listed(self._get(row, "images")),
            videos=videos_of(self._get(row, "videos")),
            fps=row.get("fps"),
            objects=self._get(row, "objects"),
            tools=tools_of(self._get(row, "tools")),
        )

    def _get(self, row: Mapping[str, Any], name: str) -> Any:
        return row.get(self.columns[name]) if name in self.columns else None

    def _turns(self, row: Mapping[str, Any]) -> Iterator[Turn]:
        if system := self._get(row, "system"):
            yield Turn("system", parts_of(system, role="system"))
        for pair in self._get(row, "history") or ():
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"history is a list of [question, answer], got {pair!r:.80} in it")
            yield from _asked(*pair)
        question = required(row, self.columns["prompt"])
        if more := self._get(row, "query"):
            question = f"{question}\n{more}" if question else more
        yield from _asked(question, required(row, self.columns["response"]))


def _asked(question: str, answer: str) -> Iterator[Turn]:
    yield Turn("user", parts_of(question, role="user"))
    yield Turn("assistant", parts_of(answer, role="assistant"))


def alpaca_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of "instruction", "input" and "output" beside "history", "system", "images".

    Args:
        model_transform: tokenizer of the recipe
        source: .json or .jsonl file, or another that `open_rows` takes
        columns: columns, if under other names, of "prompt" (instruction), "query" (input),
            "response" (output), "history", "system", "images", "videos", "tools" and "objects", as
            in LLaMA-Factory's `dataset_info.json`
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    known = {**ALPACA, **{name: name for name in COLUMNS}}
    parser = QueryParser(override(known, columns or {}))
    return conversations(model_transform, source, parser, options)
