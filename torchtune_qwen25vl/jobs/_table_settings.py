"""The keys of a job that asks questions of the rows of a table."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torchtune_qwen25vl.jobs._paths import as_path
from torchtune_qwen25vl.jobs._settings import JobSettings
from torchtune_qwen25vl.jobs._table_rows import Names, Row, read_rows

LONGEST = 2048  # characters of a prompt that memory is kept free for


@dataclass(frozen=True, kw_only=True)
class TableSettings(JobSettings):
    """The keys of such a job beside those of every job."""

    names: ClassVar[Names]  # of columns in use
    input_kind = "a table of questions"
    own_limits = True
    decides = (
        *JobSettings.decides,
        *("images_dir", "prompt", "system_prompt", "max_new_tokens"),
    )

    min_pixels: int | None = None  # null: the checkpoint's own
    images_dir: str | None = None
    # what the model is asked, and how long it answers
    prompt: str = "{question}"
    prompt_file: str | None = None
    system_prompt: str | None = None
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_file is not None and self.prompt != type(self).prompt:
            raise ValueError("give prompt or prompt_file, one of the two")

    @cached_property
    def template(self) -> str:
        """The prompt, with the names of columns in braces."""
        if self.prompt_file is None:
            return self.prompt
        return as_path(self.prompt_file).read_text("utf-8").strip()

    @property
    def named_columns(self) -> dict[str, str | None]:
        """The column of each of `names` that the settings name; None for those in use."""
        raise NotImplementedError

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of all inputs that are asked about."""
        return read_rows(
            self.sources,
            names=self.names,
            images_dir=self.images_dir,
            columns=self.named_columns,
        )

    @property
    def text_tokens(self) -> int:
        """The most tokens of a row beside its images: no token is less than a character."""
        longest = max(len(row.text) for row in self.rows)
        asked = len(self.template) + len(self.system_prompt or "") + min(longest, LONGEST)
        return asked + self.max_new_tokens

    def values(self, row: Row) -> dict[str, Any]:
        """Return what the names in braces stand for."""
        return {**row.columns, "question": row.text, "answer": row.truth}

    def question(self, row: Row) -> str:
        """Return what the model is asked about a row.

        Raises:
            ValueError: if the prompt names a column that the row does not have.
        """
        values = self.values(row)
        try:
            return self.template.format_map(values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the prompt cannot be filled in ({error!r}): a name in braces is a column, here "
                f"of {', '.join(values)}; a brace of its own is written {{{{"
            ) from error

    def asked(self, row: Row) -> str:
        """Name what is asked of a row, and about which images; empty where nothing can be."""
        try:
            asked = repr((self.question(row), row.image_id, len(row.sources)))
        except ValueError:
            return ""
        return hashlib.sha256(asked.encode("utf-8", "backslashreplace")).hexdigest()[:16]

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that answers depend on, the prompt in full."""
        return super().decisive() | {"prompt": self.template}
