"""What recipes have in common that hold the answers to a prompt against each other."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from omegaconf import DictConfig

from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.training._batches import StepBatches, equal_numbers
from torchtune_qwen25vl.training._policy_settings import PolicySettings
from torchtune_qwen25vl.training._preference_settings import PreferenceSettings
from torchtune_qwen25vl.training._recipe import Recipe
from torchtune_qwen25vl.training._trees import place_trees
from torchtune_qwen25vl.weights import find_weights, fingerprint

T = TypeVar("T", bound=PreferenceSettings | PolicySettings)


class OfTrees(Protocol):
    """What a recipe asks of its loss."""

    def begin_step(self) -> None:
        """Forget what belongs to the step before."""

    def count(self, batch: Mapping[str, Any]) -> int:
        """Count what is summed over a batch."""


class TreeRecipe(Recipe[T]):
    """A run on batches of trees, see `TreeCollate`.

    Arguments and errors are those of `Recipe`.

    Attributes:
        objective: summed loss of a batch
        frozen_media: whether encoder and merger are frozen, so that an image is encoded once a step
        placeholders: tokens that stand for images and videos
    """

    objective: OfTrees

    def __init__(self, cfg: DictConfig, settings: T) -> None:
        super().__init__(cfg, settings)
        packs = settings.pack_to is not None and self.device.type == "cuda"
        self.mask = "flex" if packs else "dense"
        self.model_identity["reference"] = None
        if settings.reference_dir is not None:
            self.reference_source, _ = find_weights(settings.reference_dir)
            self.model_identity["reference"] = fingerprint(self.reference_source)
        media = (self.parts["vision"], self.parts["merger"])
        self.frozen_media = all(part.train == "frozen" for part in media)

    @property
    def placeholders(self) -> tuple[int, int]:
        """Tokens that stand for images and videos."""
        return self.model.image_token_id, self.model.video_token_id

    def reference(self) -> Qwen25VL | None:
        """Make the model of reference_dir; None is the policy without its adapters."""
        if self.settings.reference_dir is None:
            return None
        return self.frozen_model(self.reference_source, self.settings.precision)

    def begin_step(self) -> None:
        """Forget what belongs to the batches of the step before."""
        self.objective.begin_step()

    def count(self, batch: Mapping[str, Any]) -> int:
        """Count what the loss of a batch is summed over."""
        return self.objective.count(batch)

    def ready(self, data: StepBatches) -> StepBatches:
        """Put batches on the device, equally many on every rank."""
        place_trees(data, self.device, mask=self.mask, dtype=self.model.dtype)
        return equal_numbers(data, self.device)
