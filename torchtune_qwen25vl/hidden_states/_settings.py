"""The keys of the hidden_states recipe."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import ListConfig

from torchtune_qwen25vl.generation import Sampling, check_options
from torchtune_qwen25vl.hidden_states._spans import Boundary
from torchtune_qwen25vl.jobs import (
    JobSettings,
    Row,
    as_path,
    read_rows,
)

TRIED = 3  # rows of a run with test=True
NAMES = {  # of columns
    "id": ("question_id",),
    "image": ("image", "images", "image_name", "image_id"),
    "text": ("question",),
    "answer": ("answer", "gt_answer"),
}
LONGEST = 2048  # characters of a prompt that memory is kept free for


@dataclass(frozen=True)
class Columns:
    """Columns of the table; null for the names in use."""

    id: str | None = None
    image: str | None = None
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(JobSettings):
    """The keys of the hidden_states recipe beside those of every job."""

    command = "hidden-states"
    results = "hidden_states"
    input_kind = "a table of questions"
    own_limits = True
    decides = (
        *JobSettings.decides,
        *("columns", "images_dir", "wanted", "vision_boundary", "prompt", "system_prompt", "test"),
        *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
    )

    min_pixels: int | None = None  # null: the checkpoint's own
    # what goes in
    images_dir: str | None = None
    columns: Columns = field(default_factory=Columns)
    # what is recorded
    wanted: str | ListConfig
    vision_boundary: Boundary = "last"
    format: Literal["columns", "halp"] = "columns"
    test: bool = False  # the first rows only, in a folder of their own
    # what the model is asked, and how it answers
    prompt: str = "{question}"
    prompt_file: str | None = None
    system_prompt: str | None = None
    max_new_tokens: int = 64  # 0: no answer
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens:
            check_options(self.max_new_tokens, self.sampling)
        if self.prompt_file is not None and self.prompt != "{question}":
            raise ValueError("give prompt or prompt_file, one of the two")

    @property
    def folder(self) -> Path:
        """Folder of the journal and of the results; of a test run a folder inside it."""
        return super().folder / "test" if self.test else super().folder

    @property
    def selectors(self) -> list[str]:
        """What is wanted, as selectors and presets."""
        wanted = [self.wanted] if isinstance(self.wanted, str) else self.wanted
        return [str(one) for one in wanted]

    @property
    def sampling(self) -> Sampling:
        """How a token of the answer is chosen."""
        return Sampling(*(getattr(self, name) for name in Sampling._fields))

    @cached_property
    def template(self) -> str:
        """The prompt, with the names of columns in braces."""
        if self.prompt_file is None:
            return self.prompt
        return as_path(self.prompt_file).read_text("utf-8").strip()

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of all inputs, those of a test run being the first ones."""
        own = asdict(self.columns)
        columns = own | {"text": own["question"]}
        rows = read_rows(self.sources, names=NAMES, images_dir=self.images_dir, columns=columns)
        return rows[:TRIED] if self.test else rows

    @property
    def text_tokens(self) -> int:
        """The most tokens of a row beside its images: no token is less than a character."""
        longest = max(len(row.text) for row in self.rows)
        asked = len(self.template) + len(self.system_prompt or "") + min(longest, LONGEST)
        return asked + self.max_new_tokens

    def question(self, row: Row) -> str:
        """Return what the model is asked about a row.

        Raises:
            ValueError: if the prompt names a column that the row does not have.
        """
        values = {**row.columns, "question": row.text, "answer": row.truth}
        try:
            return self.template.format_map(values)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the prompt cannot be filled in ({error!r}): a name in braces is a column, here "
                f"of {', '.join(values)}; a brace of its own is written {{{{"
            ) from error

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that states and answers depend on."""
        own = {"columns": asdict(self.columns), "prompt": self.template, "wanted": self.selectors}
        return super().decisive() | own
