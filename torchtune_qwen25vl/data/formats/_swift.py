"""ms-swift's standard rows: messages beside lists of media, boxes named apart::

{"messages": [{"role": "user", "content": "<image>Find the <ref-object>"},
              {"role": "assistant", "content": "<bbox>", "loss": true}],
 "images": ["a.jpg"],
 "objects": {"ref": ["dog"], "bbox": [[331.5, 761.4, 853.5, 1594.8]]}}

or, in place of messages, "query" and "response", with "history" and "system" (`_queries`).
"""

from collections.abc import Mapping
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data.formats._queries import QueryParser
from torchtune_qwen25vl.data.formats._shared import conversations, override
from torchtune_qwen25vl.data.formats._sharegpt import CALL, COLUMNS, ConversationParser
from torchtune_qwen25vl.transform import Qwen25VLTransform

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool_call": CALL,
    "tool_response": "ipython",
    "tool": "ipython",
}
ASKED = {"prompt": "query", "response": "response", "history": "history"}


class SwiftParser(ConversationParser):
    """The parser of ms-swift's rows, of messages or of a query and its response."""

    def __call__(self, row: dict[str, Any]) -> Conversation:
        """Parse a row.

        Raises:
            ValueError: if it is neither, or both.
        """
        column = self.columns["messages"]
        asked = [key for key in ASKED.values() if row.get(key)]
        if asked and row.get(column) is None:
            return QueryParser({**self.columns, **ASKED})(row)
        if asked:
            raise ValueError(
                f"a row has {column!r}, or a query and its response, but there is "
                f"{', '.join(asked)} beside the former; leave one out"
            )
        return super().__call__(row)


def swift_parser(columns: Mapping[str, str] | None = None) -> SwiftParser:
    """Make a parser of ms-swift's rows; `columns` renames, as in `sharegpt_parser`."""
    known = {"messages": "messages", **{name: name for name in COLUMNS}}
    return SwiftParser(override(known, columns or {}), "role", "content", ROLES)


def swift_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of ms-swift's "messages" beside "images", "videos", "objects" and "tools".

    A row may have "query" and "response", with "history", in place of "messages".

    Args:
        model_transform: tokenizer of the recipe
        source: .jsonl or .json file, or another that `open_rows` takes
        columns: columns of these, if under other names
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return conversations(model_transform, source, swift_parser(columns), options)
