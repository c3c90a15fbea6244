"""What the recipe distill minimises: the divergence of a student from its teacher.

Shapes: b rows of a batch, s tokens, n labelled tokens, d embed_dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.model import (
    Divergence,
    Qwen25VL,
    linear_divergence,
)
from torchtune_qwen25vl.training._kinds import (
    POSITIVE,
    Kind,
    check_kinds,
    read_options,
    word_of,
)
from torchtune_qwen25vl.training._step import (
    inputs_of,
    label_rows,
    labels_of,
    output_weight,
    summed_cross_entropy,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform

LOSS = {
    "loss.name": word_of(Divergence),
    "loss.beta": Kind("a number between 0 and 1", lambda v: POSITIVE.holds(v) and v < 1),
    "loss.temperature": POSITIVE,
    "loss.kd_ratio": Kind(
        "a number of more than 0 and at most 1", lambda v: POSITIVE.holds(v) and v <= 1
    ),
}


@dataclass(frozen=True)
class DistillationLoss:
    """How the two losses of a labelled token are made and mixed.

    Attributes:
        name: the divergence, see `linear_divergence`
        beta: the teacher's share of the mixture, for jsd
        temperature: divides the logits of both models in the divergence
        kd_ratio: share of the divergence; the rest is that of the labels' own cross entropy
    """

    name: Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kd_ratio: float = 0.5

    def __post_init__(self) -> None:
        check_kinds({"loss": vars(self)}, LOSS)
        if self.name != "jsd" and self.beta != type(self).beta:
            raise ValueError(f"loss.beta is for jsd alone; leave it out, got loss.beta={self.beta}")


def read_distillation_loss(section: Mapping[str, Any]) -> DistillationLoss:
    """Read the loss of a YAML, `{"name": "jsd", "beta": 0.3}`.

    Raises:
        ValueError: if there is no such divergence or option, or not with this value.
    """
    return read_options(DistillationLoss, "loss", section)


class Distillation:
    """The summed loss of a batch, and the means of both of its halves.

    Args:
        teacher: model that is not trained, in evaluation mode
        loss: how a token's loss is made
        chunk_rows: see `linear_divergence`
    """

    def __init__(self, teacher: Qwen25VL, loss: DistillationLoss, *, chunk_rows: int) -> None:
        self.teacher, self.loss, self.chunk_rows = teacher, loss, chunk_rows
        self.sums: Tensor | None = None  # of divergence, cross entropy and labels so far, [3]

    def __call__(self, model: Qwen25VL, batch: Mapping[str, Any]) -> Tensor:
        """Compute the summed loss of the labelled tokens.

        Args:
            model: student, on the batch's device
            batch: as for `summed_loss`
        """
        inputs, rows = inputs_of(batch), label_rows(batch)
        with torch.no_grad():
            theirs = self.teacher(**inputs, output_mask=rows, output="hidden")  # [n, d]
        hidden = model(**inputs, output_mask=rows, output="hidden", add_to_grad=True)  # [n, d]
        weight = output_weight(model)
        apart = linear_divergence(
            hidden,
            weight,
            theirs,
            output_weight(self.teacher),
            name=self.loss.name,
            beta=self.loss.beta,
            temperature=self.loss.temperature,
            chunk_rows=self.chunk_rows,
        )  # [n]
        divergence = (apart * batch.get("label_weights", 1.0)).sum()
        ratio = self.loss.kd_ratio
        plain = torch.zeros_like(divergence)
        if ratio < 1:
            plain = summed_cross_entropy(hidden, weight, batch, chunk_rows=self.chunk_rows)
        parts = torch.stack((divergence, plain)).detach().double()
        sums = torch.cat((parts, parts.new_tensor([labels_of(batch)])))
        self.sums = sums if self.sums is None else self.sums + sums
        return ratio * divergence + (1 - ratio) * plain

    def report(self, device: torch.device) -> dict[str, float]:
        """Return the mean of each half over all ranks, and count from now on."""
        sums = [0.0] * 3 if self.sums is None else self.sums.tolist()
        self.sums = None
        divergence, plain, labels = _ranks.sums(sums, device)
        figures = {"kd_loss": divergence / max(labels, 1)}
        return figures | ({"class_loss": plain / max(labels, 1)} if self.loss.kd_ratio < 1 else {})


def check_teacher(student: Qwen25VLTransform, teacher: Qwen25VLTransform) -> None:
    """Refuse a teacher that reads other tokens, or other pixels, than its student.

    Raises:
        ValueError: naming what differs.
    """
    own, its = student.tokenizer.token_ids(), teacher.tokenizer.token_ids()
    differing = sorted(name for name in own.keys() | its.keys() if own.get(name) != its.get(name))
    if differing:
        shown = {name: (own.get(name), its.get(name)) for name in differing[:5]}
        raise ValueError(
            f"a teacher judges the student's tokens, so both have one tokenizer, but "
            f"{len(differing)} tokens have other ids (student, teacher): {shown}; take a teacher "
            "with the tokenizer of model_dir"
        )
    seen = [
        {name: list(values) for name, values in transform.normalisation.items()}
        for transform in (student, teacher)
    ]
    if seen[0] != seen[1]:
        raise ValueError(
            f"student and teacher see the same pixels, but the student's are normalised by "
            f"{seen[0]} and the teacher's by {seen[1]}; correct the YAML, or the teacher's "
            "preprocessor_config.json"
        )
