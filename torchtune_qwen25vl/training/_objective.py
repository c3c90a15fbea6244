"""What a preference recipe minimises: a loss of the log-probabilities of a batch's answers.

Shapes: b rows of a batch, s tokens, t trees of two answers each; n labelled tokens, d embed_dim.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.modules.peft import disable_adapter

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl._torchtune import targets
from torchtune_qwen25vl.model import Qwen25VL, linear_log_probs
from torchtune_qwen25vl.training._preference import Answers, Loss, rewards
from torchtune_qwen25vl.training._step import output_weight

Batch = Mapping[str, Any]


class Objective:
    """The summed loss of a batch of trees, and figures of what it met.

    Args:
        loss: loss of each tree
        paired: whether a tree is a pair; else its second answer was moved there
        has_reference: whether the loss compares with a reference
        reference: model that is the reference; None is the policy without its adapters
        frozen_media: whether encoder and merger are frozen, so that an image is encoded once a
            step; batches are then to be made with `across_batches`. Else it is encoded once a batch
        chunk_rows: see `linear_log_probs`
    """

    def __init__(
        self,
        loss: Loss,
        *,
        paired: bool,
        has_reference: bool,
        reference: Qwen25VL | None,
        frozen_media: bool,
        chunk_rows: int,
    ) -> None:
        self.loss = loss
        self.paired = paired
        self.has_reference = has_reference
        self.reference = reference
        self.chunk_rows = chunk_rows
        self.encoder = Encoder(frozen=frozen_media)
        self.shares_embeds = frozen_media and reference is None
        self.of_reference = self.encoder if self.shares_embeds else Encoder(frozen=frozen_media)
        self.figures = Figures(paired=paired)
        self.beta = float(inspect.signature(loss).parameters["beta"].default)

    def begin_step(self) -> None:
        """Forget the images of the step before."""
        self.encoder.embeds = self.of_reference.embeds = None

    def __call__(self, model: Qwen25VL, batch: Batch) -> Tensor:
        """Compute the summed loss of the trees that count.

        Args:
            model: policy, on the batch's device
            batch: of `TreeCollate`, placed by `place_trees`
        """
        media = self.encoder(model, batch)
        reference = batch.get("reference")
        if self.has_reference and reference is None:
            reference = self.reference_log_probs(model, batch, media)
        policy = answer_log_probs(model, batch, media, chunk_rows=self.chunk_rows)
        lengths = answer_lengths(batch)
        answers = Answers(policy, reference, lengths, batch["liked"])[self._counts(lengths)]
        losses = self.loss(answers)
        self.figures.add(answers, self.beta)
        return losses.sum()

    @torch.no_grad()
    def reference_log_probs(
        self, policy: Qwen25VL, batch: Batch, media: Batch | None = None
    ) -> Tensor:
        """Compute the reference's log-probability of each answer, [t, 2].

        Args:
            policy: model that is trained
            batch: as in `__call__`
            media: the policy's arguments of media, if they are there already
        """
        model = policy if self.reference is None else self.reference
        with disable_adapter(policy):
            if media is None or not self.shares_embeds:
                media = self.of_reference(model, batch)
            return answer_log_probs(model, batch, media, chunk_rows=self.chunk_rows)

    def count(self, batch: Batch) -> int:
        """Count the trees whose loss is summed."""
        return int(self._counts(answer_lengths(batch)).sum())

    def _counts(self, lengths: Tensor) -> Tensor:
        """Say of each tree whether it counts: a row that only fills up a step does not, [t]."""
        return (lengths > 0).all(1) if self.paired else lengths[:, 0] > 0


class Encoder:
    """The model's arguments of a batch's images, each of them encoded once where that can be.

    Args:
        frozen: whether embeddings are kept from batch to batch of a step; else the model encodes
            the images of a batch in the same forward, as its gradients need it
    """

    def __init__(self, *, frozen: bool) -> None:
        self.frozen = frozen
        self.embeds: Tensor | None = None  # of the step so far, [any, d]

    def __call__(self, model: Qwen25VL, batch: Batch) -> Batch:
        """Return the arguments, after encoding what is new if encoder and merger are frozen."""
        options = {key: batch[key] for key in ("encoder_input", "encode_absent") if key in batch}
        index = {key: batch[key] for key in ("image_index", "placeholder_rows")}
        if not self.frozen:
            return options | index
        with torch.no_grad():
            embeds = model(batch["tokens"], output="vision", **options)
        self.embeds = embeds if self.embeds is None else torch.cat([self.embeds, embeds])
        return index | {"vision_embeds": self.embeds}


class Figures:
    """Means over the answers since the last report: rewards, log-probabilities, right order.

    Args:
        paired: whether the answers of a tree are a pair; else each is one that was liked or not
    """

    def __init__(self, *, paired: bool) -> None:
        self.paired = paired
        self.sums: Tensor | None = None

    def add(self, answers: Answers, beta: float) -> None:
        """Count the answers of a batch."""
        both = torch.stack([rewards(answers, beta), answers.policy.detach()])  # [2, t, 2]
        if self.paired:
            chosen, rejected = both.unbind(-1)
        else:
            chosen, rejected = both[:, answers.liked, 0], both[:, ~answers.liked, 0]
        counts = both.new_tensor([chosen.shape[1], rejected.shape[1]])
        hits = (chosen[:1] > rejected[:1]).sum(1) if self.paired else counts.new_zeros(1)
        sums = torch.cat([chosen.sum(1), rejected.sum(1), counts, hits]).double()
        self.sums = sums if self.sums is None else self.sums + sums

    def report(self, device: torch.device) -> dict[str, float]:
        """Return the means over all ranks, and count from now on."""
        sums = [0.0] * 7 if self.sums is None else self.sums.tolist()
        self.sums = None
        reward, log_prob, reward_r, log_prob_r, liked, disliked, hits = _ranks.sums(sums, device)
        liked, disliked = max(liked, 1), max(disliked, 1)
        report = {
            "rewards/chosen": reward / liked,
            "rewards/rejected": reward_r / disliked,
            "rewards/margins": reward / liked - reward_r / disliked,
            "logps/chosen": log_prob / liked,
            "logps/rejected": log_prob_r / disliked,
        }
        return report | ({"rewards/accuracies": hits / liked} if self.paired else {})


def answer_log_probs(
    model: Qwen25VL, batch: Batch, media: Batch, *, chunk_rows: int = 1024
) -> Tensor:
    """Compute the summed log-probability of the labelled tokens of each answer, [t, 2].

    Args:
        model: on the batch's device
        batch: of `TreeCollate`, placed by `place_trees`
        media: arguments of its images, of `Encoder`
        chunk_rows: see `linear_log_probs`
    """
    wanted = targets(batch["labels"])  # [b, s]
    is_labelled = wanted != CROSS_ENTROPY_IGNORE_IDX
    hidden = model(
        batch["tokens"],
        input_pos=batch["input_pos"],
        mask=batch["mask"],
        **media,
        output_mask=is_labelled,
        output="hidden",
        add_to_grad=True,
    )  # [n, d]
    log_probs = linear_log_probs(
        hidden, output_weight(model), wanted[is_labelled], chunk_rows=chunk_rows
    )
    return _summed(log_probs, batch, is_labelled)


def answer_lengths(batch: Batch) -> Tensor:
    """Count the labelled tokens of each answer, int [t, 2]."""
    is_labelled = targets(batch["labels"]) != CROSS_ENTROPY_IGNORE_IDX
    return _summed(torch.ones_like(batch["labels"])[is_labelled], batch, is_labelled)


def _summed(values: Tensor, batch: Batch, is_labelled: Tensor) -> Tensor:
    """Sum values of labelled tokens [n] by answer, [t, 2], in the same order each time."""
    tree, branch = batch["spans"][is_labelled].unbind(-1)  # [n]
    numbers = torch.arange(2 * len(batch["liked"]), device=values.device)
    is_of = 2 * tree + branch - 1 == numbers[:, None]  # [2 * t, n]
    return torch.where(is_of, values, 0).sum(1).view(-1, 2)
