"""Settings of the recipe distill: those of finetune, the teacher, and the loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_qwen25vl.training._distillation import read_distillation_loss
from torchtune_qwen25vl.training._kinds import SECTION, TEXT, Kind, check_kinds
from torchtune_qwen25vl.training._settings import Settings, refuse_broken

DISTILL: dict[str, Kind] = {"teacher_dir": TEXT, "loss": SECTION}


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """Every key of the YAML, checked; a key that is not here is refused.

    Raises:
        ValueError: if a value cannot be, contradicts another, or would have no effect.
    """

    teacher_dir: str  # a folder or hub id
    loss: DictConfig  # name: forward_kl, reverse_kl or jsd; temperature, kd_ratio, beta of jsd

    def __post_init__(self) -> None:
        super().__post_init__()
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        check_kinds(values, DISTILL)
        read_distillation_loss(self.loss)
        refuse_broken(_rules(self), values)

    def identity(self) -> dict[str, Any]:
        """Return the settings that may not change for a run to go on as if it had never stopped."""
        return super().identity() | {"loss": OmegaConf.to_container(self.loss, resolve=True)}


def _rules(settings: DistillSettings) -> Iterator[tuple[Any, ...]]:
    """Yield of each rule whether it holds, its words, and the keys it is about."""
    yield (
        settings.loss_kernel == "torch",
        "loss_kernel 'liger' knows no teacher; leave it out",
        "loss_kernel",
    )
