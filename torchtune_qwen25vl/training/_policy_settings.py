"""Settings of the recipe policy: those of finetune, the loss, the rewards, and how is drawn."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from torchtune_qwen25vl.training._kinds import (
    COUNT,
    POSITIVE,
    SECTION,
    TEXT,
    Kind,
    check_kinds,
    or_null,
)
from torchtune_qwen25vl.training._policy import read_policy_loss
from torchtune_qwen25vl.training._settings import Settings, check_component, refuse_broken

LIST = Kind("a list of sections", lambda value: isinstance(value, ListConfig) and len(value) > 0)
POLICY: dict[str, Kind] = {
    "loss": SECTION,
    "rewards": LIST,
    "reference_dir": or_null(TEXT),
    "group_size": COUNT,
    "max_new_tokens": COUNT,
    "temperature": POSITIVE,
    "iterations": COUNT,
    "rows_in_flight": or_null(COUNT),
}


@dataclass(frozen=True, kw_only=True)
class PolicySettings(Settings):
    """Every key of the YAML, checked; a key that is not here is refused.

    Raises:
        ValueError: if a value cannot be, contradicts another, or would have no effect.
    """

    loss: DictConfig  # name: grpo, dr_grpo, dapo or gspo; clip_low, clip_high, beta, scale_rewards
    rewards: ListConfig  # components, each with a weight
    reference_dir: str | None = None  # a folder or hub id; null: the model without its adapters
    group_size: int = 8  # answers to a prompt
    max_new_tokens: int  # of an answer
    temperature: float = 1.0
    iterations: int = 1  # updates by the answers of a step
    rows_in_flight: int | None = None  # answers that are continued together; null: all of a step

    def __post_init__(self) -> None:
        super().__post_init__()
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        check_kinds(values, POLICY)
        read_policy_loss(self.loss)
        for number, section in enumerate(self.rewards):
            weight = section.get("weight", 1.0) if SECTION.holds(section) else None
            if type(weight) not in (int, float):
                raise ValueError(f"rewards are components with a weight, got {section!r}")
            own = {key: value for key, value in section.items() if key != "weight"}
            check_component(f"rewards.{number}", own)
        refuse_broken(_rules(self), values)

    @property
    def figures(self) -> list[str]:
        """The figures of an evaluation that keep_best may name."""
        rewards = ["reward"] if self.val_dataset is not None else []
        return [*rewards, *self.metrics]

    def identity(self) -> dict[str, Any]:
        """Return the settings that may not change for a run to go on as if it had never stopped."""
        values = ("group_size", "max_new_tokens", "temperature", "iterations")
        own = {key: getattr(self, key) for key in values}
        sections = {
            key: OmegaConf.to_container(getattr(self, key), resolve=True)
            for key in ("loss", "rewards")
        }
        return super().identity() | own | sections


def _rules(settings: PolicySettings) -> Iterator[tuple[Any, ...]]:
    """Yield of each rule whether it holds, its words, and the keys it is about."""
    s = settings
    yield (
        s.group_size > 1,
        "an answer is held against others, so a group has 2 or more",
        "group_size",
    )
    has_reference = s.loss.get("beta", 0.0) > 0
    yield (
        has_reference or s.reference_dir is None,
        "with loss.beta 0 there is no reference; leave reference_dir out, or set loss.beta",
        *("reference_dir", "loss"),
    )
    full = [name for name, part in s.parts.items() if part.get("train") == "full"]
    yield (
        not has_reference or bool(s.reference_dir) or not full,
        f"the reference is the model without its adapters, but {', '.join(map(str, full))} is "
        "trained in full; set reference_dir to the model's folder, or loss.beta to 0",
        "reference_dir",
    )
    limit = s.tokenizer.get("max_seq_len")
    longest = None if limit is None else limit + s.group_size * s.max_new_tokens
    yield (
        s.pack_to is None or (longest is not None and s.pack_to >= longest),
        "a packed row holds a prompt with all of its answers, so pack_to is at least "
        f"tokenizer.max_seq_len + group_size * max_new_tokens ({longest}); raise it, or lower one",
        "pack_to",
    )
    yield (
        not (s.adapters or {}).get("lora_dropout"),
        "answers are drawn without dropout, so they are trained on without: leave "
        "adapters.lora_dropout out",
        "adapters",
    )
    yield (
        s.rows_in_flight is None or s.rows_in_flight >= s.group_size,
        "a group is begun together, so rows_in_flight is at least group_size",
        *("rows_in_flight", "group_size"),
    )
    yield (
        s.loss_kernel == "torch",
        "loss_kernel 'liger' has no log-probabilities of single tokens; leave it out",
        "loss_kernel",
    )
