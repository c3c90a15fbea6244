"""The keys of the caption recipe, and what they say about prompts, captions and places."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from omegaconf import ListConfig

from torchtune_qwen25vl.captioning._plan import Policy
from torchtune_qwen25vl.captioning._prompts import Preset, Wording, read_preset
from torchtune_qwen25vl.captioning._tables import input_of
from torchtune_qwen25vl.captioning._texts import Existing, TextFiles
from torchtune_qwen25vl.generation import check_options
from torchtune_qwen25vl.jobs import JobSettings, as_path
from torchtune_qwen25vl.media import LACKING, SUFFIXES

RETRIED = ("failed", "cut", "looped")


@dataclass(frozen=True)
class Columns:
    """Columns of a table."""

    image: str = "image"
    caption: str | None = "caption"
    tags: str | None = "tags"


@dataclass(frozen=True, kw_only=True)
class Settings(JobSettings):
    """The keys of the caption recipe beside those of every job."""

    command = "caption"
    results = "captions"
    file_words = ("apply",)
    decides = (
        *JobSettings.decides,
        *("columns", "preset", "prompt", "prompt_file", "system_prompt", "language"),
        *("trigger", "prefix", "suffix", "newlines", "existing", "separator"),
        *("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty"),
    )

    min_pixels: int
    # what goes in, what comes out
    recursive: bool = True
    exclude: str | ListConfig = ""  # patterns of names or paths that are left out of folders
    columns: Columns = field(default_factory=Columns)
    outputs: ListConfig  # of txt, jsonl, csv, metadata
    table_paths: Literal["absolute", "relative"] = "absolute"
    mirror_dir: str | None = None  # text files there instead of beside the images
    text_naming: Literal["stem", "full"] = "stem"
    text_suffix: str = ".txt"
    existing: Existing = "skip"
    separator: str = " "  # between an answer and the caption that it is appended or prepended to
    retry: str | ListConfig = ""  # states of images that are captioned again
    write_states: ListConfig  # states whose captions get a text file
    review: bool = True
    apply: str | None = None  # edits that the review page saved
    # what the model is asked
    preset: str = "standard"
    prompt: str | None = None
    prompt_file: str | None = None
    system_prompt: str | None = None
    language: str | None = None
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    newlines: Literal["keep", "space"] = "keep"
    # how it answers; null: as in the preset
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give prompt or prompt_file, one of the two")
        preset = self.full_preset
        check_options(preset.max_new_tokens, preset.sampling)
        self.policy  # noqa: B018
        name = Path(f"a{self.text_suffix}")
        if name.stem != "a" or not name.suffix or name.suffix.lower() in (*SUFFIXES, *LACKING):
            raise ValueError(
                f"text_suffix is a dot and letters, and no image's, got {self.text_suffix!r}"
            )
        if not self.retried <= set(RETRIED):
            raise ValueError(f"retry is of {', '.join(RETRIED)}, got {sorted(self.retried)}")
        if self.retried - {"failed"} and self.existing in ("append", "prepend"):
            raise ValueError(
                f"with existing={self.existing} an answer cannot be told from the caption it was "
                f"joined to, so retry is of failed, got {sorted(self.retried)}"
            )

    @cached_property
    def _inputs(self) -> list[Any]:
        if self.inputs or self.apply is None:
            return super()._inputs
        return [str(input_of(as_path(self.apply)))]

    @property
    def excluded(self) -> list[str]:
        """The patterns to exclude, none, one or many."""
        return _texts(self.exclude)

    @property
    def retried(self) -> set[str]:
        """The states of images that are captioned again."""
        return {*_texts(self.retry), *(["failed"] if self.retry_failed else [])}

    @cached_property
    def full_preset(self) -> Preset:
        """The preset with the keys that change it: the question, and how it is answered."""
        prompt = self.prompt
        if self.prompt_file is not None:
            prompt = as_path(self.prompt_file).read_text("utf-8").strip()
        return read_preset(
            self.preset,
            prompt=prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def text_tokens(self) -> int:
        """The most tokens of a row beside its image: no token is less than a character."""
        asked = len(self.full_preset.prompt) + len(self.system_prompt or "")
        return asked + self.full_preset.max_new_tokens

    @cached_property
    def wording(self) -> Wording:
        """What is said to the model, and around its answer."""
        return Wording(
            self.full_preset.prompt,
            system=self.system_prompt,
            language=self.language,
            trigger=self.trigger,
            prefix=self.prefix,
            suffix=self.suffix,
            newlines=self.newlines,
            separator=self.separator,
        )

    @cached_property
    def policy(self) -> Policy:
        """What becomes of captions, old and new."""
        mirror = None if self.mirror_dir is None else as_path(self.mirror_dir).absolute()
        return Policy(
            list(self.outputs),
            TextFiles(mirror, self.text_naming, self.text_suffix),
            self.existing,
            list(self.write_states),
            uses_existing="{caption}" in self.full_preset.prompt,
        )

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that captions depend on, the prompt in full."""
        full = {"prompt": self.full_preset.prompt, "columns": asdict(self.columns)}
        return super().decisive() | full


def _texts(value: str | ListConfig) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    return [str(text) for text in texts if text]
