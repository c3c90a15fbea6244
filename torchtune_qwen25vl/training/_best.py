"""The best evaluation of a run so far, and how many worse ones came after it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

LOWER = ("loss",)  # figures of which less is better
MARK = "best.json"  # file of the best checkpoint's folder


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        step: after which it was; 0 where there was none
        value: value of the figure that decides
        worse: number of evaluations since, none of which was better
    """

    step: int = 0
    value: float = math.nan
    worse: int = 0

    @classmethod
    def read(cls, run: Path | None) -> Self:
        """Read what a checkpoint's run knows; of none, nothing."""
        return cls(**(torch.load(run, weights_only=True).get("best") or {})) if run else cls()

    def after(self, step: int, figures: Mapping[str, float], name: str) -> Self:
        """Take in another evaluation.

        Args:
            step: after which it is
            figures: figures of the evaluation
            name: which of them decides, without the `val_` before it
        """
        value = figures[f"val_{name}"]
        gain = self.value - value if name in LOWER else value - self.value
        if self.step == 0 or gain > 0:
            return type(self)(step, value)
        return replace(self, worse=self.worse + 1)

    def is_given_up(self, worse: int | None) -> bool:
        """Say whether so many worse evaluations have come since that a run is to end."""
        return worse is not None and self.worse >= worse

    def __str__(self) -> str:
        return f"that of {self.name}, {self.value:.4f}"

    @property
    def name(self) -> str:
        """Name of its checkpoint."""
        return f"step_{self.step}"

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint has to know of it."""
        return asdict(self)

    def mark(self, checkpoints: list[Path]) -> None:
        """Leave a mark in the best checkpoint, and in no other."""
        for path in checkpoints:
            if path.name == self.name:
                (path / MARK).write_text(json.dumps(asdict(self)) + "\n")
            else:
                (path / MARK).unlink(missing_ok=True)
