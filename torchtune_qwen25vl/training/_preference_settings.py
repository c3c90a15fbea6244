"""Settings of the recipe preference: those of finetune, the loss, and what it is held against."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_qwen25vl.training._kinds import SECTION, SWITCH, TEXT, Kind, check_kinds, or_null
from torchtune_qwen25vl.training._preference import FROM_REFERENCE, read_loss
from torchtune_qwen25vl.training._settings import Settings, forget_bad_rows, refuse_broken

PREFERENCE: dict[str, Kind] = {
    "loss": SECTION,
    "reference_dir": or_null(TEXT),
    "precompute_reference": SWITCH,
}


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(Settings):
    """Every key of the YAML, checked; a key that is not here is refused.

    Raises:
        ValueError: if a value cannot be, contradicts another, or would have no effect.
    """

    loss: DictConfig  # name: dpo, ipo, hinge, simpo, orpo, kto or mpo; and its options
    reference_dir: str | None = None  # a folder or hub id; null: the model without its adapters
    precompute_reference: bool = False  # its log-probabilities once, before the first step

    def __post_init__(self) -> None:
        super().__post_init__()
        values = {key: getattr(self, key) for key in self.__dataclass_fields__}
        check_kinds(values, PREFERENCE)
        read_loss(self.loss)
        refuse_broken(_rules(self), values)

    @property
    def paired(self) -> bool:
        """Whether a row has two answers."""
        return self.loss.name != "kto"

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss.name in FROM_REFERENCE

    def identity(self) -> dict[str, Any]:
        """Return the settings that may not change for a run to go on as if it had never stopped."""
        own = {
            "loss": OmegaConf.to_container(self.loss, resolve=True),
            "precompute_reference": self.precompute_reference,
        }
        return super().identity() | own

    def reference_identity(self, dataset: str) -> dict[str, Any]:
        """Return the settings on which the reference's log-probabilities of a data set depend.

        Args:
            dataset: key of the data set
        """
        sections: dict[str, Any] = {
            key: OmegaConf.to_container(getattr(self, key), resolve=True)
            for key in ("tokenizer", dataset)
        }
        forget_bad_rows(sections[dataset])
        return {**sections, "precision": self.precision, "seed": self.seed}


def _rules(settings: PreferenceSettings) -> Iterator[tuple[Any, ...]]:
    """Yield of each rule whether it holds, its words, and the keys it is about."""
    s = settings
    yield (
        s.has_reference or not (s.reference_dir or s.precompute_reference),
        f"the loss {s.loss.name} knows no reference; leave reference_dir and precompute_reference "
        "out",
        *("reference_dir", "precompute_reference"),
    )
    full = [name for name, part in s.parts.items() if part.get("train") == "full"]
    yield (
        not s.has_reference or bool(s.reference_dir) or s.precompute_reference or not full,
        f"the reference is the model without its adapters, but {', '.join(map(str, full))} is "
        "trained in full; set precompute_reference True, or reference_dir to the model's folder",
        *("reference_dir", "precompute_reference"),
    )
    yield (
        s.paired or (s.batch_size > 1 and s.pack_to is None and not s.precompute_reference),
        "the loss kto moves answers among the rows of a padded batch, so it needs a batch_size "
        "from 2, pack_to null and precompute_reference False",
        *("batch_size", "pack_to", "precompute_reference"),
    )
    limit = s.tokenizer.get("max_seq_len")
    yield (
        s.pack_to is None or (limit is not None and s.pack_to >= 2 * limit),
        f"a packed row holds both answers of a pair, so pack_to is at least twice "
        f"tokenizer.max_seq_len ({limit}); raise it, or set that to half of it",
        "pack_to",
    )
    yield (
        s.loss_kernel == "torch",
        "loss_kernel 'liger' has no log-probabilities of single tokens; leave it out",
        "loss_kernel",
    )
