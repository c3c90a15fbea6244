"""The keys of the hidden_states recipe."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import ListConfig

from torchtune_qwen25vl.generation import Sampling, check_options
from torchtune_qwen25vl.hidden_states._spans import Boundary
from torchtune_qwen25vl.jobs import Row, TableSettings

TRIED = 3  # rows of a run with test=True
NAMES = {  # of columns
    "id": ("question_id",),
    "image": ("image", "images", "image_name", "image_id"),
    "text": ("question",),
    "answer": ("answer", "gt_answer"),
}


@dataclass(frozen=True)
class Columns:
    """Columns of the table; null for the names in use."""

    id: str | None = None
    image: str | None = None
    question: str | None = None
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(TableSettings):
    """The keys of the hidden_states recipe beside those of every job on a table."""

    command = "hidden-states"
    results = "hidden_states"
    names = NAMES
    decides = (
        *TableSettings.decides,
        *("columns", "wanted", "vision_boundary", "test"),
        *("temperature", "top_k", "top_p", "repetition_penalty"),
    )

    columns: Columns = field(default_factory=Columns)
    # what is recorded
    wanted: str | ListConfig
    vision_boundary: Boundary = "last"
    format: Literal["columns", "halp"] = "columns"
    test: bool = False  # the first rows only, in a folder of their own
    # how the model answers; max_new_tokens=0: not at all
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens:
            check_options(self.max_new_tokens, self.sampling)

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

    @property
    def named_columns(self) -> dict[str, str | None]:
        """The column of each of `names` that the settings name; None for those in use."""
        own = asdict(self.columns)
        return own | {"text": own["question"]}

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of all inputs, those of a test run being the first ones."""
        return super().rows[:TRIED] if self.test else super().rows

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that states and answers depend on."""
        return super().decisive() | {"columns": asdict(self.columns), "wanted": self.selectors}
