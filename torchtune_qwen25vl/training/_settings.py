"""Settings of the recipe finetune: every key of its YAML, checked before anything is loaded."""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, get_args, get_type_hints

from omegaconf import DictConfig
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from torchtune_qwen25vl.training._plan import WARMUP

CHOICES = ("dtype", "loss_kernel", "save")
COUNTS = (
    *("batch_size", "gradient_accumulation_steps", "loss_chunk_rows"),
    *("log_every_n_steps", "keep_last_n_checkpoints"),
)
COUNTS_OR_NULL = ("max_steps", "pack_to", "eval_every_n_steps", "save_every_n_steps")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every key of the YAML, checked; a key that is not here is refused.

    Raises:
        ValueError: if a value cannot be, contradicts another, or would have no effect.
    """

    # where from, where to
    model_dir: str | DictConfig  # folder or hub id of the model, or a component that makes one
    output_dir: str  # OUTPUT/model or OUTPUT/adapter, OUTPUT/step_N
    from_scratch: bool = False  # random weights in place of those in model_dir
    resume: bool = True  # go on from the last checkpoint in output_dir; False renames all there are
    # what is trained, and how
    parts: DictConfig  # of vision, merger, decoder: train, lr, weight_decay
    adapters: DictConfig | None = None  # lora_attn_modules, apply_lora_to_mlp, lora_rank, ...
    optimizer: DictConfig  # a component, without lr; called with one group for each trained part
    lr_scheduler: DictConfig  # a component; called with the optimizer and num_training_steps
    warmup_ratio: float | None = None  # part of all steps, for lr_scheduler.num_warmup_steps
    clip_grad_norm: float | None = None
    loss_chunk_rows: int = 1024  # labelled rows whose logits the kernel torch holds at a time
    loss_kernel: Literal["torch", "liger"] = "torch"
    # data
    tokenizer: DictConfig  # a component: messages to samples, Qwen25VLTransform
    dataset: DictConfig  # a component; called with the tokenizer
    val_dataset: DictConfig | None = None  # likewise
    dataloader: DictConfig = field(default_factory=lambda: DictConfig({}))  # num_workers, ...
    shuffle: bool = True
    # how much of it
    epochs: float | None = None  # passes over the data; or
    max_steps: int | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    pack_to: int | None = None  # tokens of a packed row; null pads
    # on what
    device: str  # cuda, cpu, ...
    dtype: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    enable_activation_checkpointing: bool = False
    seed: int = 0
    # what is written, and when
    metric_logger: DictConfig  # a component
    log_every_n_steps: int = 1
    peak_tflops: float | None = None  # of the device in bf16, for MFU; known for some GPUs
    eval_every_n_steps: int | None = None
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int = 2
    save: Literal["model", "adapter"] = "model"  # adapters merged, or in PEFT's form
    after_training: DictConfig | None = None  # a component; called with that folder and seconds

    def __post_init__(self) -> None:
        for holds, rule, *keys in _rules(self):
            if not holds:
                got = ", ".join(f"{key}={getattr(self, key)!r}" for key in keys)
                raise ValueError(f"{rule}, got {got}")
        if self.after_training is not None:
            _check_component("after_training", self.after_training)


def read_settings(cfg: DictConfig) -> Settings:
    """Read the settings of a YAML.

    Raises:
        ValueError: if it has a key that means nothing, lacks one, or two contradict each other.
    """
    known = Settings.__dataclass_fields__
    if unknown := sorted(set(map(str, cfg)) - set(known)):
        raise ValueError(f"unknown keys {unknown}; the recipe reads {sorted(known)}")
    try:
        return Settings(**{str(key): cfg[key] for key in cfg})
    except TypeError as error:
        raise ValueError(f"the YAML is not complete: {error}") from error


def _rules(settings: Settings) -> Iterator[tuple[Any, ...]]:
    """Yield of each rule whether it holds, its words, and the keys it is about."""
    s, kinds = settings, get_type_hints(Settings)
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
    ratio = s.warmup_ratio
    yield (
        ratio is None or (isinstance(ratio, (int, float)) and 0 <= ratio < 1),
        "warmup_ratio is a part of all steps from 0 to below 1, or null",
        "warmup_ratio",
    )
    yield (
        ratio is None or WARMUP not in s.lr_scheduler,
        f"give warmup_ratio or lr_scheduler.{WARMUP}, not both",
        *("warmup_ratio", "lr_scheduler"),
    )
    yield (
        "num_training_steps" not in s.lr_scheduler,
        "lr_scheduler takes no num_training_steps, as the recipe counts them: leave it out, and "
        "set epochs or max_steps",
        "lr_scheduler",
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
            s.loss_chunk_rows == Settings.loss_chunk_rows,  # the default
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


def _check_component(key: str, section: Mapping[str, Any]) -> None:
    """Refuse a component that cannot be imported, because it is called only after hours."""
    if os.getcwd() not in sys.path:  # as config.instantiate does
        sys.path.append(os.getcwd())
    name = str(section.get("_component_"))
    try:
        _get_component_from_path(name)
    except InstantiationError as error:
        raise ValueError(
            f"{key} must name what can be imported, but {name} cannot ({error.__cause__}); "
            f"install what is missing, or leave it out by ~{key}"
        ) from error
