"""What the recipes' steps have in common: batches, training, figures, validation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.training._batches import (
    Mask,
    StepBatches,
    StepCollate,
    equal_numbers,
    to_device,
)
from torchtune_qwen25vl.training._parts import GradientCheck
from torchtune_qwen25vl.training._samples import Share, ValidationSampler, make_loader, seed_step
from torchtune_qwen25vl.training._settings import Settings
from torchtune_qwen25vl.training._step import StepResult, labels_of, mean_loss, train_step
from torchtune_qwen25vl.training._throughput import Throughput
from torchtune_qwen25vl.training._walk import Walk

S = TypeVar("S", bound=Settings)


class Reports(Protocol):
    """Sums of what went through a loss, None where nothing has; means of them are reported."""

    sums: Any

    def report(self, device: torch.device) -> dict[str, float]:
        """Return the means over all ranks, and count from now on."""


class NoFigures:
    """Nothing but the loss is reported."""

    sums: Any = None

    def report(self, device: torch.device) -> dict[str, float]:
        """Return nothing."""
        return {}


class Stepping(ABC, Generic[S]):
    """Steps of a recipe, for which it makes the loss; set up by `Recipe`.

    Attributes:
        loss: summed loss of a batch
        counted: name in the log of what `count` counts
        figures: means that are logged beside the loss
    """

    settings: S
    device: torch.device
    rank: int
    share: Share
    mask: Mask
    tokenizer: Any
    val_dataset: Any
    val_walk: Walk
    model: Qwen25VL
    optimizer: Optimizer
    scheduler: LRScheduler
    check: GradientCheck
    throughput: Throughput
    logger: Any
    step: int
    total_steps: int
    loss: Callable[[Qwen25VL, Mapping[str, Any]], Tensor]
    counted = "labels"
    figures: Reports = NoFigures()

    @abstractmethod
    def prepare(self) -> None:
        """Make the loss, and what else a step needs, once data and model are there."""

    def count(self, batch: Mapping[str, Any]) -> float:
        """Count what the loss of a batch is summed over, of which the mean is taken."""
        return labels_of(batch)

    def begin_step(self) -> None:
        """Forget what belongs to the batches of the step before."""

    def collate(self) -> Any:
        """Make the collate from the samples of a step to its batches, padded or packed."""
        return StepCollate(
            self.tokenizer.pad_id,
            batch_size=self.settings.batch_size,
            pack_to=self.settings.pack_to,
            mask=self.mask,
        )

    def ready(self, data: StepBatches) -> StepBatches:
        """Put batches on the device, equally many on every rank."""
        to_device(data, self.device, mask=self.mask, dtype=self.model.dtype)
        return equal_numbers(data, self.device)

    def take_step(self, loader: Iterator[StepBatches]) -> float:
        """Train on the next batches, log what came of it, and return the loss."""
        settings = self.settings
        data = self.ready(self.next_batches(loader))
        seed_step(settings.seed, self.step)
        rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        self.begin_step()
        result = self.update(data)
        self.step += 1
        self.throughput.add(data)
        if self.due(settings.log_every_n_steps):
            step = {"loss": result.loss, self.counted: result.labels, "grad_norm": result.grad_norm}
            self.log(step | self.figures.report(self.device) | rates | self.throughput.report())
        return result.loss

    def next_batches(self, loader: Iterator[Any]) -> StepBatches:
        """Return the batches of the next step."""
        return self.throughput.waiting(loader)

    def update(self, data: StepBatches, **changes: Any) -> StepResult:
        """Train on the batches of a step, with these arguments of `train_step` changed."""
        options = {
            "scheduler": self.scheduler,
            "max_grad_norm": self.settings.clip_grad_norm,
            "check": self.check,
            "loss": self.loss,
            "count": self.count,
        }
        return train_step(self.model, self.optimizer, data.batches, **{**options, **changes})

    def validate(self) -> dict[str, float]:
        """Return the mean loss and the figures of the validation data."""

        def batches() -> Iterator[dict[str, Any]]:
            for data in self.val_steps():
                self.begin_step()
                yield from data.batches

        of_training, self.figures.sums = self.figures.sums, None
        loss = mean_loss(
            self.model, batches(), device=self.device, loss=self.loss, count=self.count
        )
        figures = {"loss": loss} | self.figures.report(self.device)
        self.figures.sums = of_training
        return {f"val_{name}": value for name, value in figures.items()}

    def due(self, every: int | None) -> bool:
        """Say whether what is done every so many steps is due after this one."""
        return every is not None and (self.step % every == 0 or self.step == self.total_steps)

    def loader(self, dataset: Any, sampler: Any, walk: Walk) -> DataLoader:
        """Make the loader of one step's batches after another, from places of a walk."""
        settings = self.settings
        return make_loader(
            dataset,
            sampler,
            self.collate(),
            seed=settings.seed,
            empty=walk.empty,
            streams=walk.streams,
            **settings.dataloader,
        )

    def val_steps(self) -> Iterator[StepBatches]:
        """Yield the validation data, on the device."""
        sampler = ValidationSampler(self.val_walk.of_pass, self.share, self.val_walk.portions)
        return map(self.ready, self.loader(self.val_dataset, sampler, self.val_walk))

    def log(self, figures: Mapping[str, float]) -> None:
        """Hand figures of this step to the logger."""
        if self.rank == 0:
            self.logger.log_dict(figures, step=self.step)
