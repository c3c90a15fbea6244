"""The keys that every job has, and how a config becomes settings."""

import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig

from torchtune_qwen25vl.jobs._paths import as_path, folder_of
from torchtune_qwen25vl.jobs._workers import Workers, count_cores
from torchtune_qwen25vl.media import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """The keys of a job's YAML; a key that is not here, or in the job's own class, is refused."""

    command: ClassVar[str]  # name of the short command
    results: ClassVar[str]  # what the output folder is named after
    decides: ClassVar[tuple[str, ...]] = (  # keys that the results depend on
        *("model", "settings_dir", "seed", "min_pixels", "max_pixels"),
    )

    file_words: ClassVar[tuple[str, ...]] = ()  # keys that may be set as `--key FILE`
    input_kind: ClassVar[str] = "a folder of images"
    takes_adapters: ClassVar[bool] = False  # whether a model may be a folder of PEFT's form
    own_limits: ClassVar[bool] = False  # whether pixel limits that are null are the checkpoint's

    inputs: Any  # folders, images, patterns, lists, tables
    output_dir: str | None = None  # null: in or beside the first input
    # what is done with what was done before
    retry_failed: bool = False
    restart: bool = False
    dry_run: bool = False
    # model and machine
    model: str
    settings_dir: str | None = None
    cache_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "sdpa"
    four_bit: str = "auto"
    cpu_kernels: str = "auto"
    allow_downgrade: bool = False
    seed: int = 0
    min_pixels: int | None
    max_pixels: int | None = None  # null: as many as free memory allows, or see own_limits
    batch_size: int
    batch_tokens: int | None = None  # null: as many as free memory allows
    workers: int | None = None  # processes that read images; null: one for each spare core
    seconds_per_image: float = 120

    def __post_init__(self) -> None:
        if not any(self._inputs):
            raise ValueError(f"inputs are missing: name {self.input_kind}")
        if wrong := [one for one in self._inputs if not isinstance(one, (str, os.PathLike))]:
            raise ValueError(f"inputs are paths, got {wrong}: quote what looks like a number")
        if self.seconds_per_image <= 0:
            raise ValueError(f"seconds_per_image is more than 0, got {self.seconds_per_image}")
        for name, least in (("batch_size", 1), ("batch_tokens", 1), ("workers", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is at least {least}, got {value}")
        limits = [1, self.min_pixels, self.max_pixels]
        given = [limit for limit in limits if limit is not None]
        if given != sorted(given):
            raise ValueError(
                f"pixel limits are 0 < min_pixels <= max_pixels, got {self.min_pixels} and "
                f"{self.max_pixels}"
            )

    @property
    def sources(self) -> list[str]:
        """The inputs, one or many."""
        return list(map(str, self._inputs))

    @property
    def _inputs(self) -> list[Any]:
        return list(self.inputs) if isinstance(self.inputs, (list, ListConfig)) else [self.inputs]

    @property
    def folder(self) -> Path:
        """Folder of the journal and of the results."""
        if self.output_dir is not None:
            return as_path(self.output_dir)
        first = as_path(self.sources[0])
        is_one_of_many = len(self.sources) > 1 and first.suffix.lower() in SUFFIXES
        if first.is_file() and is_one_of_many:  # what a shell makes of photos/*.jpg
            return first.parent / f"_{self.results}"
        if first.is_file():
            return first.with_name(f"{first.stem}_{self.results}")
        return folder_of(first) / f"_{self.results}"

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that the results depend on."""
        return {key: getattr(self, key) for key in self.decides}

    def tokens_together(self, allowed: int) -> int:
        """The most tokens that go through the model together.

        Args:
            allowed: as many as free memory allows
        """
        return allowed if self.batch_tokens is None else min(self.batch_tokens, allowed)

    def start_workers(self, processes: int) -> Workers:
        """Start the processes that read images.

        Args:
            processes: number of ranks that share this machine
        """
        spare = min(8, max(1, count_cores() // processes - 1))
        count = spare if self.workers is None else self.workers
        return Workers(count, seconds=self.seconds_per_image)


S = TypeVar("S", bound=JobSettings)


def kinds_of(settings: type[JobSettings]) -> dict[str, Any]:
    """The keys of a job, each with the type it is declared as."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in fields(settings)}


def read_settings(cfg: DictConfig, settings: type[S]) -> S:
    """Read a config as settings of this class.

    A setting that is a dataclass itself is a mapping in the config.

    Raises:
        ValueError: if the config has a key that means nothing, lacks one, has a value of another
            kind, or two contradict each other.
    """
    kinds, values = kinds_of(settings), {str(key): cfg[key] for key in cfg}
    if unknown := sorted(set(values) - set(kinds)):
        raise ValueError(f"unknown keys {unknown}; `{settings.command} --help` lists those it has")
    if isinstance(four_bit := values.get("four_bit"), bool):  # what YAML makes of on and off
        values["four_bit"] = "on" if four_bit else "off"
    for key, value in values.items():
        if is_dataclass(kinds[key]):
            values[key] = _nested(key, value, kinds[key])
        elif not _is_a(value, kinds[key]):
            raise ValueError(f"{key} is {_words(kinds[key])}, got {value!r}")
    try:
        return settings(**values)
    except TypeError as error:
        raise ValueError(f"a key is missing: {error}") from error


def _nested(key: str, value: Any, kind: Any) -> Any:
    kinds = get_type_hints(kind)
    if not isinstance(value, DictConfig):
        raise ValueError(f"{key} is a mapping of {', '.join(kinds)}, got {value!r}")
    if unknown := sorted(map(str, value.keys() - kinds)):
        raise ValueError(f"{key} has another key than {', '.join(kinds)}: {', '.join(unknown)}")
    for name in value:
        if not _is_a(value[name], kinds[str(name)]):
            raise ValueError(f"{key}.{name} is {_words(kinds[str(name)])}, got {value[name]!r}")
    return kind(**value)


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value of a config is what a setting is declared as."""
    if kind is Any:
        return True
    if options := get_args(kind):
        return value in options or any(_is_a(value, option) for option in options)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    word = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    return word.replace("ListConfig", "list")
