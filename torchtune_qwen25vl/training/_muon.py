"""Muon for matrices and AdamW for the rest, as one optimiser: for models trained from nothing."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Runs torch's Muon on every matrix, and torch's AdamW on biases and the scales of norms.

    Muon's steps are scaled to the size of AdamW's, so that both take the same learning rate.

    Args:
        params: groups of parameters, each with an lr, and a weight_decay if not 0
        momentum: momentum of Muon
        betas: betas of AdamW

    Source: https://kellerjordan.github.io/posts/muon; the scaling: arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Iterable[Mapping[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        matrices: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        for group in params:
            for half, is_matrix in ((matrices, True), (rest, False)):
                chosen = [p for p in group["params"] if (p.ndim == 2) == is_matrix]
                if chosen:
                    half.append({"weight_decay": 0.0, **group, "params": chosen})
        self._halves: list[Optimizer] = []  # they hold the groups and states of this optimiser
        if matrices:
            muon = Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
            self._halves.append(muon)
        if rest:
            self._halves.append(AdamW(rest, betas=betas))
        super().__init__([group for half in self._halves for group in half.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step, without a closure."""
        assert closure is None
        groups = iter(self.param_groups)
        for half in self._halves:  # a checkpoint may have replaced what they share
            half.param_groups = list(itertools.islice(groups, len(half.param_groups)))
            half.state = self.state
            half.step()
