"""The keys of the embed_prompts recipe."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from torchtune_qwen25vl.conditioning._prompts import Compat
from torchtune_qwen25vl.conditioning._sources import find_prompts
from torchtune_qwen25vl.conditioning._store import Layout
from torchtune_qwen25vl.conditioning._templates import Task, template_of
from torchtune_qwen25vl.jobs import JobSettings, Row


@dataclass(frozen=True)
class Columns:
    """Columns of a table; null for the names in use."""

    id: str | None = None
    image: str | None = None
    prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(JobSettings):
    """The keys of the embed_prompts recipe beside those of every job."""

    command = "embed-prompts"
    results = "prompt_embeds"
    input_kind = "a table of prompts, a folder of text files, or a list with a prompt a line"
    own_limits = True
    decides = (
        *JobSettings.decides,
        *("tokenizer", "config", "mmproj", "task", "resize", "max_sequence_length", "compat"),
        *("columns", "images_dir", "layout"),
    )

    min_pixels: int | None = None
    batch_tokens: int = 4096
    # what goes in
    images_dir: str | None = None
    columns: Columns = field(default_factory=Columns)
    # what is made of it
    task: Task = "text_to_image"
    resize: bool = True
    max_sequence_length: int | None = None
    compat: Compat = "qwen"
    layout: Layout = "diffusers"
    # of single files
    tokenizer: str | None = None
    config: str | None = None
    mmproj: str | None = None
    keep_fp8: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        template_of(self.task)
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise ValueError(
                f"max_sequence_length is a number of tokens, got {self.max_sequence_length}"
            )
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        if given := [name for name, value in limits.items() if value is not None]:
            raise ValueError(
                f"sizes of images are the task's, got {', '.join(given)}: leave it out, or set "
                "resize=False for the limits of the model's processor"
            )

    @cached_property
    def rows(self) -> list[Row]:
        """The prompts of all inputs."""
        columns = asdict(self.columns)
        return find_prompts(
            self.sources,
            images_dir=self.images_dir,
            columns=columns | {"text": columns["prompt"]},
            takes_images=self.task != "text_to_image",
        )

    @property
    def text_tokens(self) -> int:
        """The most tokens of a prompt, its template included: none is less than a character."""
        longest = max(len(row.text) for row in self.rows)
        return len(template_of(self.task).system) + longest

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that embeddings depend on."""
        return super().decisive() | {"columns": asdict(self.columns)}
