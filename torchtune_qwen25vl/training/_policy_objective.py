"""What the recipe policy minimises: a loss of answers that the model gave itself.

Shapes: n labelled tokens of a batch, t trees of g answers each, a = t * g, m longest answer.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.training._objective import Media, answer_lengths, token_log_probs
from torchtune_qwen25vl.training._policy import Drawn, PolicyLoss, answer_losses

Batch = Mapping[str, Any]


class PolicyObjective:
    """The summed loss of a batch of trees, and figures of what it met.

    Probabilities are those of the sampler: logits divided by its temperature, without the tokens
    that it never draws.

    Args:
        loss: how the loss of an answer is made
        temperature: temperature of the sampler
        banned: tokens that the sampler never draws
        answers: g
        max_new_tokens: longest answer that the sampler gives
        reference: model that is the reference; None is the policy without its adapters
        frozen_media: whether encoder and merger are frozen, see `Objective`
        chunk_rows: see `linear_log_probs`
    """

    def __init__(
        self,
        loss: PolicyLoss,
        *,
        temperature: float,
        banned: Sequence[int],
        answers: int,
        max_new_tokens: int,
        reference: Qwen25VL | None,
        frozen_media: bool,
        chunk_rows: int,
    ) -> None:
        self.loss = loss
        self.answers, self.max_new_tokens = answers, max_new_tokens
        self.options = {
            "temperature": temperature,
            "banned": tuple(banned),
            "chunk_rows": chunk_rows,
        }
        self.media = Media(reference, frozen=frozen_media)
        self.before: dict[int, Tensor] = {}  # of each batch of the step, [a, m]
        self.figures = PolicyFigures()

    def begin_step(self) -> None:
        """Forget the answers of the step before."""
        self.begin_iteration()
        self.before = {}

    def begin_iteration(self) -> None:
        """Forget what the policy of the iteration before made of the images."""
        self.media.forget()

    def __call__(self, model: Qwen25VL, batch: Batch) -> Tensor:
        """Compute the summed loss of the answers that count, or for dapo of their tokens.

        Args:
            model: policy, on the batch's device
            batch: batch of `GroupCollate`, placed by `place_trees`, with its "number" in the step
        """
        media = self.media(model, batch)
        lengths = answer_lengths(batch, self.answers).flatten()  # [a]
        reference = None
        if self.loss.beta > 0:
            with torch.no_grad(), self.media.against(model, batch, media) as (other, arguments):
                reference = self._log_probs(other, batch, arguments, lengths)
        policy = self._log_probs(model, batch, media, lengths)
        is_new = batch["number"] not in self.before
        before = self.before.setdefault(batch["number"], policy.detach())
        drawn = Drawn(policy, before, reference, lengths, batch["advantages"].flatten())
        losses, figures = answer_losses(drawn, self.loss, self.max_new_tokens)
        tokens = drawn.is_token.sum()
        self.figures.add({name: (value, tokens) for name, value in figures.items()})
        if is_new:
            apart = (policy.detach() - batch["sampled"]).abs() * drawn.is_token
            self.figures.add({"sampler/difference": (apart.sum(), tokens)})
            self.figures.largest("sampler/largest_difference", apart)
        return losses.sum()

    def count(self, batch: Batch) -> int:
        """Count what is summed."""
        lengths = answer_lengths(batch, self.answers)
        return int(lengths.sum() if self.loss.name == "dapo" else (lengths > 0).sum())

    def _log_probs(self, model: Qwen25VL, batch: Batch, media: Batch, lengths: Tensor) -> Tensor:
        """Compute the log-probability of every token of each answer, [a, m]."""
        values = token_log_probs(model, batch, media, **self.options)  # [n]
        rows = pad_sequence(values.split(lengths.tolist()), batch_first=True)
        return F.pad(rows, (0, batch["sampled"].shape[1] - rows.shape[1]))


class PolicyFigures:
    """Means, and largest values, since the last report."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float | Tensor, float | Tensor]] | None = None
        self.most: dict[str, Tensor] = {}

    def add(self, figures: Mapping[str, tuple[float | Tensor, float | Tensor]]) -> None:
        """Add sums, and how many were summed, by name."""
        known = self.sums or {}
        for name, (total, count) in figures.items():
            before = known.get(name, (0.0, 0.0))
            known[name] = (before[0] + total, before[1] + count)
        self.sums = known

    def largest(self, name: str, values: Tensor) -> None:
        """Keep the largest of these and those before."""
        if values.numel():
            most = values.max()
            self.most[name] = torch.maximum(self.most.get(name, most), most)

    def report(self, device: torch.device) -> dict[str, float]:
        """Return means and largest values over all ranks, and count from now on."""
        names = sorted({name for part in _ranks.gathered(list(self.sums or {})) for name in part})
        own = self.sums or {}
        pairs = [tuple(map(float, own.get(name, (0.0, 0.0)))) for name in names]
        totals = _ranks.sums([value for pair in pairs for value in pair], device)
        means = {name: totals[2 * k] / max(totals[2 * k + 1], 1.0) for k, name in enumerate(names)}
        largest: dict[str, float] = {}
        for part in _ranks.gathered({name: float(value) for name, value in self.most.items()}):
            for name, value in part.items():
                largest[name] = max(largest.get(name, value), value)
        self.sums, self.most = None, {}
        return means | largest
