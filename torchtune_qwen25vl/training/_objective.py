"""What a preference recipe minimises: a loss of the log-probabilities of a batch's answers.

Shapes: b rows of a batch, s tokens, t trees of two answers each; n labelled tokens, d embed_dim.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
        self.chunk_rows = chunk_rows
        self.media = Media(reference, frozen=frozen_media)
        self.figures = Figures(paired=paired)
        self.beta = float(inspect.signature(loss).parameters["beta"].default)

    def begin_step(self) -> None:
        """Forget the images of the step before."""
        self.media.forget()

    def __call__(self, model: Qwen25VL, batch: Batch) -> Tensor:
        """Compute the summed loss of the trees that count.

        Args:
            model: policy, on the batch's device
            batch: batch of `TreeCollate`, placed by `place_trees`
        """
        media = self.media(model, batch)
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
        with self.media.against(policy, batch, media) as (model, arguments):
            return answer_log_probs(model, batch, arguments, chunk_rows=self.chunk_rows)

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


class Media:
    """Arguments of images, for the policy and for what it is held against.

    Args:
        reference: model that is the reference; None is the policy without its adapters
        frozen: see `Encoder`
    """

    def __init__(self, reference: Qwen25VL | None, *, frozen: bool) -> None:
        self.reference = reference
        self.encoder = Encoder(frozen=frozen)
        self.shares = frozen and reference is None
        self.of_reference = self.encoder if self.shares else Encoder(frozen=frozen)

    def forget(self) -> None:
        """Forget the images of the step before."""
        self.encoder.embeds = self.of_reference.embeds = None

    def __call__(self, policy: Qwen25VL, batch: Batch) -> Batch:
        """Return the policy's arguments."""
        return self.encoder(policy, batch)

    @contextmanager
    def against(
        self, policy: Qwen25VL, batch: Batch, media: Batch | None = None
    ) -> Iterator[tuple[Qwen25VL, Batch]]:
        """Give the reference, and its arguments of the images of a batch.

        Args:
            policy: model that is trained, without adapters in the meantime
            batch: batch of `TreeCollate`
            media: the policy's arguments, if they are there already
        """
        model = policy if self.reference is None else self.reference
        with disable_adapter(policy):
            known = media if self.shares else None
            yield model, self.of_reference(model, batch) if known is None else known


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
        batch: batch of `TreeCollate`, placed by `place_trees`
        media: arguments of its images, of `Encoder`
        chunk_rows: see `linear_log_probs`
    """
    return _summed(token_log_probs(model, batch, media, chunk_rows=chunk_rows), batch)


def token_log_probs(model: Qwen25VL, batch: Batch, media: Batch, **options: Any) -> Tensor:
    """Compute the log-probability of each labelled token, [n].

    They are in the order of the batch: tree by tree, answer by answer.

    Args:
        model: on the batch's device
        batch: batch of `TreeCollate`, placed by `place_trees`
        media: arguments of its images, of `Encoder`
        **options: of `linear_log_probs`
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
    return linear_log_probs(hidden, output_weight(model), wanted[is_labelled], **options)


def answer_lengths(batch: Batch, answers: int = 2) -> Tensor:
    """Count the labelled tokens of each answer, int [t, answers].

    Args:
        batch: batch of `TreeCollate`
        answers: answers of a tree
    """
    is_labelled = targets(batch["labels"]) != CROSS_ENTROPY_IGNORE_IDX
    return _summed(torch.ones_like(batch["labels"])[is_labelled], batch, answers)


def _summed(values: Tensor, batch: Batch, answers: int = 2) -> Tensor:
    """Sum values of labelled tokens [n] by answer, [t, answers], in the same order each time."""
    is_labelled = targets(batch["labels"]) != CROSS_ENTROPY_IGNORE_IDX
    tree, branch = batch["spans"][is_labelled].unbind(-1)  # [n]
    numbers = torch.arange(answers * len(batch["samples"]), device=values.device)
    is_of = answers * tree + branch - 1 == numbers[:, None]  # [t * answers, n]
    return torch.where(is_of, values, 0).sum(1).view(-1, answers)
