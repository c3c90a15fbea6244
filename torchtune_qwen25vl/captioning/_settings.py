"""The keys of the caption recipe, and what they say about prompts, captions and places."""

import glob
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig

from torchtune_qwen25vl.captioning._outputs import Existing, TextFiles
from torchtune_qwen25vl.captioning._plan import Policy
from torchtune_qwen25vl.captioning._prompts import Preset, Wording, read_preset
from torchtune_qwen25vl.generation import Sampling, check_options
from torchtune_qwen25vl.jobs import Columns

# Captions depend on these: a journal in which they differ belongs to another run
DECISIVE = (
    *("model", "settings_dir", "preset", "prompt", "prompt_file", "system_prompt", "language"),
    *("trigger", "prefix", "suffix", "existing", "max_new_tokens", "temperature", "top_k"),
    *("top_p", "repetition_penalty", "seed", "min_pixels", "max_pixels"),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every key of the YAML; a key that is not here is refused."""

    # what goes in, what comes out
    inputs: Any  # folders, images, patterns, lists, tables
    recursive: bool = True
    columns: Columns = field(default_factory=Columns)  # of tables: image, caption, tags
    output_dir: str | None = None  # journal, tables, review page; null: in or beside the input
    outputs: ListConfig  # of txt, jsonl, csv
    mirror_dir: str | None = None  # text files there instead of beside the images
    text_naming: Literal["stem", "full"] = "stem"
    existing: Existing = "skip"
    write_states: ListConfig  # states whose captions get a text file
    review: bool = True
    # what is done with what was done before
    retry_failed: bool = False
    restart: bool = False
    dry_run: bool = False
    # what the model is asked
    preset: str = "standard"
    prompt: str | None = None
    prompt_file: str | None = None
    system_prompt: str | None = None
    language: str | None = None
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    # how it answers; null: as in the preset
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    # model and machine
    model: str
    settings_dir: str | None = None
    cache_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    four_bit: str = "auto"
    allow_downgrade: bool = False
    min_pixels: int
    max_pixels: int | None = None  # null: as many as free memory allows
    batch_size: int
    batch_tokens: int
    workers: int | None = None  # processes that read images; null: one for each spare core
    seconds_per_image: float = 120

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("inputs are missing: name a folder of images")
        if wrong := [one for one in self._inputs if not isinstance(one, (str, os.PathLike))]:
            raise ValueError(f"inputs are paths, got {wrong}: quote what looks like a number")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("give prompt or prompt_file, one of the two")
        if self.seconds_per_image <= 0:
            raise ValueError(f"seconds_per_image is more than 0, got {self.seconds_per_image}")
        for name, least in (("batch_size", 1), ("batch_tokens", 1), ("workers", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is at least {least}, got {value}")
        if not 0 < self.min_pixels <= (self.max_pixels or self.min_pixels):
            raise ValueError(
                f"pixel limits are 0 < min_pixels <= max_pixels, got {self.min_pixels} and "
                f"{self.max_pixels}"
            )
        preset = self.read_preset()
        sampling = Sampling(*(getattr(preset, name) for name in Sampling._fields))
        check_options(preset.max_new_tokens, sampling)
        self.policy()

    @property
    def sources(self) -> list[str]:
        """The inputs, one or many."""
        return list(map(str, self._inputs))

    @property
    def _inputs(self) -> list[Any]:
        return list(self.inputs) if isinstance(self.inputs, (list, ListConfig)) else [self.inputs]

    @property
    def folder(self) -> Path:
        """Where journal, tables and review page go."""
        if self.output_dir is not None:
            return Path(self.output_dir).expanduser()
        first = Path(self.sources[0]).expanduser()
        if first.is_file():
            return first.with_name(f"{first.stem}_captions")
        while glob.has_magic(str(first)):
            first = first.parent
        return first / "_captions"

    def read_preset(self) -> Preset:
        """The question, and how the answer is sampled."""
        prompt = self.prompt
        if self.prompt_file is not None:
            prompt = Path(self.prompt_file).expanduser().read_text("utf-8").strip()
        return read_preset(
            self.preset,
            prompt=prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )

    def wording(self) -> Wording:
        """What is said to the model, and around its answer."""
        return Wording(
            self.read_preset().prompt,
            system=self.system_prompt,
            language=self.language,
            trigger=self.trigger,
            prefix=self.prefix,
            suffix=self.suffix,
        )

    def policy(self) -> Policy:
        """What becomes of captions, old and new."""
        mirror = None if self.mirror_dir is None else Path(self.mirror_dir).expanduser().absolute()
        return Policy(
            list(self.outputs),
            TextFiles(mirror, self.text_naming),
            self.existing,
            list(self.write_states),
            uses_existing="{caption}" in self.read_preset().prompt,
        )

    def decisive(self) -> dict[str, Any]:
        """The settings that captions depend on."""
        values = {key: getattr(self, key) for key in DECISIVE}
        return {**values, "prompt": self.read_preset().prompt}


def read_settings(cfg: DictConfig) -> Settings:
    """Settings of a YAML.

    Raises:
        ValueError: if it has a key that means nothing, lacks one, has a value of another kind, or
            two contradict each other.
    """
    if unknown := sorted(set(map(str, cfg)) - set(Settings.__dataclass_fields__)):
        raise ValueError(f"unknown keys {unknown}; `caption --help` lists those there are")
    kinds, values = get_type_hints(Settings), {str(key): cfg[key] for key in cfg}
    if isinstance(four_bit := values.get("four_bit"), bool):  # what YAML makes of on and off
        values["four_bit"] = "on" if four_bit else "off"
    for key, value in values.items():
        if not _is_a(value, kinds[key]):
            raise ValueError(f"{key} is {_words(kinds[key])}, got {value!r}")
    try:
        columns = Columns(**values.get("columns", {}))
        return Settings(**{**values, "columns": columns})
    except TypeError as error:
        raise ValueError(f"a key is missing, or columns has another: {error}") from error


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of a YAML is what a setting is declared as."""
    if kind in (Any, Columns):
        return True
    if options := get_args(kind):
        return value in options or any(_is_a(value, option) for option in options)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    word = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return word.replace("ListConfig", "list")
