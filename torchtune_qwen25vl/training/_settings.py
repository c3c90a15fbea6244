"""What the YAML of the recipe finetune must say, checked before anything is loaded."""

import os
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

CHOICES = ("dtype", "loss_kernel", "save")
COUNTS = (
    *("batch_size", "gradient_accumulation_steps", "loss_chunk_rows"),
    *("log_every_n_steps", "keep_last_n_checkpoints"),
)
COUNTS_OR_NULL = ("max_steps", "pack_to", "eval_every_n_steps", "save_every_n_steps")


def check_settings(settings: Any) -> None:
    """Refuse values that cannot be, contradict each other, or would have no effect.

    Args:
        settings: the recipe's, one attribute for each key of the YAML

    Raises:
        ValueError: with the rule that is broken, and the values that break it.
    """
    for holds, rule, *keys in _rules(settings):
        if not holds:
            got = ", ".join(f"{key}={getattr(settings, key)!r}" for key in keys)
            raise ValueError(f"{rule}, got {got}")


def check_component(key: str, section: Mapping[str, Any] | None) -> None:
    """Import what a section of the YAML names, where it is called only after hours of training.

    Args:
        key: of the section
        section: its `_component_` is imported, and not called; None has none

    Raises:
        ValueError: if that is not possible, naming what is missing.
    """
    if section is None:
        return
    if os.getcwd() not in sys.path:  # as config.instantiate does
        sys.path.append(os.getcwd())
    name = str(section.get("_component_"))
    try:
        _get_component_from_path(name)
    except InstantiationError as error:
        raise ValueError(
            f"{key} must name what can be imported, but {name} cannot ({error.__cause__}); "
            f"install what is missing, or delete {key} from a copy of the config"
        ) from error


def _rules(settings: Any) -> Iterator[tuple[Any, ...]]:
    """Whether it holds, what the rule is, and the keys it is about; the first broken one counts."""
    s, kinds = settings, get_type_hints(type(settings))
    for key in CHOICES:
        options = get_args(kinds[key])  # of Literal[...]
        yield getattr(s, key) in options, f"{key} is one of {list(options)}", key
    for key in COUNTS + COUNTS_OR_NULL:
        rule, value = f"{key} is a whole number from 1", getattr(s, key)
        if key in COUNTS_OR_NULL:
            yield value is None or _is_count(value), f"{rule}, or null", key
        else:
            yield _is_count(value), rule, key
    given = [s.epochs is not None, s.max_steps is not None]
    yield sum(given) == 1, "give epochs or max_steps, one of the two", "epochs", "max_steps"
    yield s.epochs is None or s.epochs > 0, "epochs is more than 0", "epochs"
    yield (
        s.save == "model" or bool(s.adapters),
        "save 'adapter' needs adapters, and no part has any; use 'model'",
        *("save", "adapters"),
    )
    yield (
        (s.eval_every_n_steps is None) == (s.val_dataset is None),
        "eval_every_n_steps and val_dataset need each other",
        *("eval_every_n_steps", "val_dataset"),
    )
    yield (
        not {"lr", "weight_decay"} & set(s.optimizer),
        "the optimizer takes no lr and no weight_decay, as each part has its own: set "
        "parts.<name>.lr and parts.<name>.weight_decay",
        "optimizer",
    )
    limit = s.tokenizer.get("max_seq_len")
    yield (
        s.pack_to is None or limit is None or s.pack_to >= limit,
        f"a packed row holds the longest sample, so pack_to is at least tokenizer.max_seq_len "
        f"({limit}); raise it, or lower that",
        "pack_to",
    )
    if s.loss_kernel == "liger":
        yield (
            s.loss_chunk_rows == type(s).loss_chunk_rows,  # the default
            "loss_kernel 'liger' cuts rows in its own way; leave loss_chunk_rows out",
            "loss_chunk_rows",
        )
        yield (
            find_spec("liger_kernel") is not None,
            "loss_kernel 'liger' needs the package liger-kernel, that is the extra cuda: "
            "`pip install '.[cuda]'` in the repository, or use 'torch'",
            "loss_kernel",
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
