"""Settings of the recipe finetune: every key of its YAML, checked before anything is loaded."""

import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args, overload

from omegaconf import DictConfig, OmegaConf
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path

from torchtune_qwen25vl.data import AMOUNT, parts_in
from torchtune_qwen25vl.device import CpuKernels
from torchtune_qwen25vl.media import BUFFER
from torchtune_qwen25vl.training._kinds import DATALOADER, DATASET, check_keys, check_kinds
from torchtune_qwen25vl.training._plan import WARMUP
from torchtune_qwen25vl.training._precision import Precision, problem_of

COMPONENTS = ("optimizer", "lr_scheduler", "tokenizer", "dataset", "metric_logger")
COMPONENTS_OR_NULL = ("val_dataset", "after_training")


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
    export: str | None = None  # step_N: write the result as it was then, and train nothing
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
    precision: Precision = "bf16_stochastic"  # see training/_precision.py
    cpu_kernels: CpuKernels = "auto"  # fp32: oneDNN on a CPU of AMD, else torch; or one of them
    compile: bool | None = None  # null: on a GPU
    enable_activation_checkpointing: bool = False
    seed: int = 0
    # what is written, and when
    metric_logger: DictConfig  # a component
    log_every_n_steps: int = 1
    peak_tflops: float | None = None  # of the device in bf16, for MFU; known for some GPUs
    eval_every_n_steps: int | None = None
    eval_by_generation: DictConfig | None = None  # source, metrics, ...: a table to be answered
    keep_best: str | None = None  # a metric of it, or loss: its best checkpoint stays
    save_best: bool = False  # the result is that of the best checkpoint, not of the last step
    stop_after_n_worse: int | None = None  # evaluations that were not better; null: never
    save_every_n_steps: int | None = None
    keep_last_n_checkpoints: int = 2
    save: Literal["model", "adapter"] = "model"  # adapters merged, or in PEFT's form
    after_training: DictConfig | None = None  # a component; called with that folder and seconds

    def __post_init__(self) -> None:
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        check_kinds(values)
        check_keys("dataloader", self.dataloader, DATALOADER)
        refuse_broken(_rules(self), values)
        for key in (*COMPONENTS, *COMPONENTS_OR_NULL):
            if values[key] is not None:
                check_component(key, values[key])
        for key in ("dataset", "val_dataset"):
            _check_parts(key, values[key] or {})
            _refuse_buffer(key, values[key] or {}, is_shuffled=key == "dataset" and self.shuffle)

    @property
    def figures(self) -> list[str]:
        """The figures of an evaluation that keep_best may name."""
        return [*(["loss"] if self.val_dataset is not None else []), *self.metrics]

    @property
    def metrics(self) -> list[str]:
        """Those of the model's own answers."""
        metrics = (self.eval_by_generation or {}).get("metrics") or []
        return [metrics] if isinstance(metrics, str) else list(map(str, metrics))

    @property
    def _evaluation(self) -> list[Any] | None:
        """What the best checkpoint is chosen by; None where none is."""
        if self.keep_best is None:
            return None
        by_answers = self.keep_best in self.metrics
        data = self.eval_by_generation if by_answers else self.val_dataset
        return [self.keep_best, OmegaConf.to_container(DictConfig(data), resolve=True)]

    def identity(self) -> dict[str, Any]:
        """Return the settings that may not change for a run to go on as if it had never stopped."""
        values = ("clip_grad_norm", "precision", "shuffle", "seed", "warmup_ratio")
        sections = {
            key: OmegaConf.to_container(getattr(self, key), resolve=True)
            for key in ("optimizer", "lr_scheduler", "tokenizer", "dataset")
        }
        forget_bad_rows(sections["dataset"])
        own = {key: getattr(self, key) for key in values}
        return {**own, **sections, "keep_best": self._evaluation}


def forget_bad_rows(dataset: Any) -> None:
    """Take skip_bad_rows out of the section of a data set: the walk tells which rows it has."""
    for section in (dataset, *parts_in(dataset)):
        section.pop("skip_bad_rows", None)


S = TypeVar("S", bound=Settings)


@overload
def read_settings(cfg: DictConfig) -> Settings: ...
@overload
def read_settings(cfg: DictConfig, kind: type[S]) -> S: ...
def read_settings(cfg: DictConfig, kind: type[Settings] = Settings) -> Settings:
    """Read the settings of a YAML.

    Args:
        cfg: YAML
        kind: settings of the recipe

    Raises:
        ValueError: if it has a key that means nothing, lacks one, or two contradict each other.
    """
    known = kind.__dataclass_fields__
    if "dtype" in cfg:
        raise ValueError(
            f"dtype is called precision, one of {', '.join(get_args(Precision))}, got "
            f"dtype={cfg['dtype']}"
        )
    if unknown := sorted(set(map(str, cfg)) - set(known)):
        raise ValueError(f"unknown keys {unknown}; the recipe reads {sorted(known)}")
    try:
        return kind(**{str(key): cfg[key] for key in cfg})
    except TypeError as error:
        raise ValueError(f"the YAML is not complete: {error}") from error


def refuse_broken(rules: Iterable[tuple[Any, ...]], values: Mapping[str, Any]) -> None:
    """Refuse settings that break a rule.

    Args:
        rules: of each whether it holds, its words, and the keys it is about
        values: settings by key

    Raises:
        ValueError: with the words of the first that is broken.
    """
    for holds, rule, *keys in rules:
        if not holds:
            got = ", ".join(f"{key}={values[key]!r}" for key in keys)
            raise ValueError(f"{rule}, got {got}")


def _rules(settings: Settings) -> Iterator[tuple[Any, ...]]:
    """Yield of each rule whether it holds, its words, and the keys it is about."""
    s = settings
    given = [s.epochs is not None, s.max_steps is not None]
    yield sum(given) == 1, "give epochs or max_steps, one of the two", "epochs", "max_steps"
    yield (
        s.save == "model" or bool(s.adapters),
        "save 'adapter' needs adapters, and no part has any; use 'model'",
        *("save", "adapters"),
    )
    yield (
        (s.eval_every_n_steps is None) == (s.val_dataset is None and s.eval_by_generation is None),
        "eval_every_n_steps and val_dataset need each other, or it and eval_by_generation",
        *("eval_every_n_steps", "val_dataset", "eval_by_generation"),
    )
    yield (
        s.keep_best is None or s.keep_best in s.figures,
        f"keep_best is one of the figures of an evaluation, here {s.figures}",
        "keep_best",
    )
    yield (
        s.keep_best is not None or not (s.save_best or s.stop_after_n_worse),
        "save_best and stop_after_n_worse need keep_best, which says what is better",
        *("save_best", "stop_after_n_worse", "keep_best"),
    )
    yield (
        not {"lr", "weight_decay"} & set(s.optimizer),
        "the optimizer takes no lr and no weight_decay, as each part has its own: set "
        "parts.<name>.lr and parts.<name>.weight_decay",
        "optimizer",
    )
    yield (
        s.warmup_ratio is None or WARMUP not in s.lr_scheduler,
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
    trained = {str(name): str(part.get("train")) for name, part in s.parts.items()}
    problem = problem_of(s.precision, s.optimizer, trained)
    yield not problem, problem, "precision"
    yield (
        s.cpu_kernels == "auto" or s.precision == "fp32",
        "cpu_kernels is about products in fp32, others have one library: leave it out, or set "
        "precision=fp32",
        *("cpu_kernels", "precision"),
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


def _check_parts(key: str, mixture: Mapping[str, Any]) -> None:
    """Refuse a part of a mixture that is no data set; the mixture refuses what it cannot mix."""
    for number, part in enumerate(parts_in(mixture)):
        name = f"datasets[{number}]"
        kinds = {f"{key}.{name}.{option}": kind for option, kind in DATASET.items()}
        check_kinds({key: {name: part}}, kinds)
        section = {option: value for option, value in part.items() if option not in AMOUNT}
        check_component(f"{key}.{name}", section)


def _refuse_buffer(key: str, dataset: Mapping[str, Any], *, is_shuffled: bool) -> None:
    """Refuse to say among how many rows streams are shuffled, where rows come in their order."""
    if not is_shuffled and any(BUFFER in part for part in (dataset, *parts_in(dataset))):
        raise ValueError(
            f"{BUFFER} is how many rows of a stream are shuffled at a time, but those of {key} are "
            "not shuffled here; leave it out"
        )


def check_component(key: str, section: Mapping[str, Any]) -> None:
    """Refuse a component that cannot be imported or does not take its keys, before all else."""
    if os.getcwd() not in sys.path:  # as config.instantiate does
        sys.path.append(os.getcwd())
    name = str(section.get("_component_"))
    try:
        component = _get_component_from_path(name)
    except InstantiationError as error:
        remedy = f", or delete {key} from a copy of the config" if key in COMPONENTS_OR_NULL else ""
        raise ValueError(
            f"{key} must name what can be imported, but {name} cannot ({error.__cause__}); "
            f"install what is missing{remedy}"
        ) from error
    try:
        inspect.signature(component).bind_partial(
            **{str(option): value for option, value in section.items() if option != "_component_"}
        )
    except TypeError as error:
        raise ValueError(f"{key} must suit {name}: {error}; mend its keys") from error
    parameters = inspect.signature(component).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    counted = {WARMUP, "num_training_steps"}  # by the recipe
    if missing := [name for name in needed if name not in {*section, *counted}]:
        raise ValueError(f"{key} must suit {name}: it needs {', '.join(missing)}; mend its keys")
