"""What each setting of the YAML may be: one table of kinds and ranges."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

L = TypeVar("L")


class Kind(NamedTuple):
    """A kind of value.

    Attributes:
        words: what it is, for people
        holds: whether a value is of this kind
    """

    words: str
    holds: Callable[[Any], bool]


def one_of(*choices: str) -> Kind:
    """Return the kind of a word from a list."""
    return Kind(f"one of {list(choices)}", lambda value: value in choices)


def word_of(words: Any) -> Kind:
    """Return the kind of a word of a Literal."""
    choices = get_args(words)
    return Kind(f"one of {', '.join(choices)}", lambda value: value in choices)


def or_null(kind: Kind) -> Kind:
    """Return a kind, or null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(values: Any, count: int, fits: Callable[[float], bool]) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    return is_list and len(values) == count and all(_is_number(v) and fits(v) for v in values)


def _is_suffix(value: Any) -> bool:
    return isinstance(value, str) and len(value) > 1 and Path(f"a{value}").suffix == value


SWITCH = Kind("True or False", lambda value: type(value) is bool)
COUNT = Kind("a whole number from 1", lambda value: _is_whole(value, 1))
WHOLE = Kind("a whole number from 0", lambda value: _is_whole(value, 0))
POSITIVE = Kind("a number of more than 0", lambda value: _is_number(value) and value > 0)
AMOUNT = Kind("a number from 0", lambda value: _is_number(value) and value >= 0)
SHARE = Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
TEXT = Kind("a text", lambda value: isinstance(value, str) and value != "")
NAMES = Kind(
    "a list of names",
    lambda value: not isinstance(value, str) and all(isinstance(name, str) for name in value),
)
MEANS = Kind("a list of 3 numbers", lambda value: _are_numbers(value, 3, lambda v: True))
DEVIATIONS = Kind(
    "a list of 3 numbers of more than 0", lambda value: _are_numbers(value, 3, lambda v: v > 0)
)
BETAS = Kind(
    "a list of 2 numbers from 0 to below 1",
    lambda value: _are_numbers(value, 2, lambda v: 0 <= v < 1),
)
SUFFIX = Kind("a dot and letters", _is_suffix)
SECTION = Kind("a section of keys", lambda value: isinstance(value, Mapping))
SECTION_OR_TEXT = Kind(
    "a folder, a hub id or a component", lambda value: TEXT.holds(value) or SECTION.holds(value)
)

PARTS = ("vision", "merger", "decoder")
Training = Literal["frozen", "full", "lora", "dora", "qlora"]
PART = {
    "train": one_of(*get_args(Training)),
    "lr": or_null(POSITIVE),
    "weight_decay": or_null(AMOUNT),
}
ADAPTERS = {
    "lora_attn_modules": NAMES,
    "apply_lora_to_mlp": SWITCH,
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
}
DATALOADER = {
    "num_workers": WHOLE,
    "prefetch_factor": or_null(COUNT),
    "persistent_workers": SWITCH,
    "pin_memory": SWITCH,
    "timeout": AMOUNT,
    "multiprocessing_context": or_null(one_of("fork", "forkserver", "spawn")),
}
VIDEO = {
    "min_pixels": COUNT,
    "max_pixels": COUNT,
    "total_pixels": or_null(COUNT),
    "num_frames": or_null(COUNT),
    "fps": or_null(POSITIVE),
    "min_frames": COUNT,
    "max_frames": COUNT,
    "image_mean": MEANS,
    "image_std": DEVIATIONS,
}
DATASET = {
    "source": TEXT,
    "split": or_null(TEXT),
    "streaming": SWITCH,
    "shuffle_buffer_size": COUNT,
    "prompt": TEXT,
    "image_column": TEXT,
    "caption_column": TEXT,
    "text_suffix": SUFFIX,
    "media_root": or_null(TEXT),
    "prepend_media": SWITCH,
    "fps": or_null(POSITIVE),
    "pixel_limit": COUNT,
    "allow_download": SWITCH,
    "download_dir": or_null(TEXT),
    "skip_bad_rows": or_null(TEXT),
}
KINDS: dict[str, Kind] = {
    "model_dir": SECTION_OR_TEXT,
    "output_dir": TEXT,
    "from_scratch": SWITCH,
    "resume": SWITCH,
    "export": or_null(TEXT),
    "parts": SECTION,
    "adapters": or_null(SECTION),
    "optimizer": SECTION,
    "optimizer.betas": BETAS,
    "optimizer.eps": POSITIVE,
    "lr_scheduler": SECTION,
    "lr_scheduler.num_cycles": POSITIVE,
    "lr_scheduler.num_warmup_steps": WHOLE,
    "warmup_ratio": or_null(SHARE),
    "clip_grad_norm": or_null(POSITIVE),
    "loss_chunk_rows": COUNT,
    "loss_kernel": one_of("torch", "liger"),
    "tokenizer": SECTION,
    "tokenizer.max_seq_len": or_null(COUNT),
    "tokenizer.min_pixels": COUNT,
    "tokenizer.max_pixels": COUNT,
    "tokenizer.image_mean": MEANS,
    "tokenizer.image_std": DEVIATIONS,
    "tokenizer.video": or_null(SECTION),
    **{f"tokenizer.video.{key}": kind for key, kind in VIDEO.items()},
    "dataset": SECTION,
    "val_dataset": or_null(SECTION),
    **{f"{name}.{key}": DATASET[key] for name in ("dataset", "val_dataset") for key in DATASET},
    "dataloader": SECTION,
    "shuffle": SWITCH,
    "epochs": or_null(POSITIVE),
    "max_steps": or_null(COUNT),
    "batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "pack_to": or_null(COUNT),
    "device": TEXT,
    "precision": one_of("bf16_stochastic", "bf16_mixed", "fp32", "bf16"),
    "cpu_kernels": one_of("auto", "torch", "onednn"),
    "compile": or_null(SWITCH),
    "enable_activation_checkpointing": SWITCH,
    "seed": WHOLE,
    "metric_logger": SECTION,
    "log_every_n_steps": COUNT,
    "peak_tflops": or_null(POSITIVE),
    "eval_every_n_steps": or_null(COUNT),
    "eval_by_generation": or_null(SECTION),
    "keep_best": or_null(TEXT),
    "save_best": SWITCH,
    "stop_after_n_worse": or_null(COUNT),
    "save_every_n_steps": or_null(COUNT),
    "keep_last_n_checkpoints": COUNT,
    "save": one_of("model", "adapter"),
    "after_training": or_null(SECTION),
    **{f"adapters.{key}": kind for key, kind in ADAPTERS.items()},
    **{f"dataloader.{key}": kind for key, kind in DATALOADER.items()},
    **{f"parts.{part}": SECTION for part in PARTS},
    **{f"parts.{part}.{key}": kind for part in PARTS for key, kind in PART.items()},
}


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind] = KINDS) -> None:
    """Check every value that is there against a table.

    Args:
        values: settings by name; sections are mappings
        kinds: kinds by name, those within a section with a dot

    Raises:
        ValueError: if a value is of another kind, naming its key.
    """
    for key, kind in kinds.items():
        for value in _at(values, key.split(".")):
            if not kind.holds(value):
                raise ValueError(f"{key} is {kind.words}, got {key}={value!r}")


def check_keys(name: str, section: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse keys that a section does not have.

    Raises:
        ValueError: naming them.
    """
    if unknown := sorted(set(map(str, section)) - set(known)):
        raise ValueError(f"{name} has no keys {unknown}; it takes {list(known)}")


def read_options(made: type[L], name: str, section: Mapping[str, Any]) -> L:
    """Make a dataclass of a section whose keys are its fields.

    Raises:
        ValueError: if it has no such field; what the class refuses is its own.
    """
    check_keys(name, section, [one.name for one in fields(made)])  # type: ignore[arg-type]
    return made(**{str(key): value for key, value in section.items()})


def _at(values: Mapping[str, Any], path: list[str]) -> Iterator[Any]:
    """Yield what stands at a path, if anything does."""
    first, *rest = path
    if first in values:
        if not rest:
            yield values[first]
        elif isinstance(values[first], Mapping):
            yield from _at(values[first], rest)
