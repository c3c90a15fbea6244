"""Distillation: losses and every gradient against the plain formulas with all logits of both."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from parity import pairs, reference
from parity.inputs import Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage, gradient_error
from torchtune_qwen25vl import hf_to_tune
from torchtune_qwen25vl.training import Distillation, StepCollate, read_distillation_loss

MODEL = "tiny"
TOLERANCE, OF_GRADIENTS, OF_ITSELF = 1e-5, 1e-4, 1e-6
ROWS_MORE = 40  # of the teacher's vocabulary, as 7B has 128 more than 3B
LAYOUT: list[list[int | tuple]] = [
    [4, (1, 6, 10), 9],
    [15],
    [2, (1, 4, 4), 3, (1, 8, 4), 7],
    [3, (3, 4, 6, 1.0), 5],
]
LOSSES: dict[str, dict[str, float]] = {
    "forward_kl": {"temperature": 2.0, "kd_ratio": 1.0},
    "reverse_kl": {"temperature": 0.7, "kd_ratio": 0.4},
    "jsd": {"beta": 0.3, "temperature": 1.5, "kd_ratio": 0.8},
}


def _kl(target: Tensor, other: Tensor) -> Tensor:
    return (target.exp() * (target - other)).sum(-1)


def _jsd(t: Tensor, s: Tensor) -> Tensor:
    mixture = (0.7 * s.exp() + 0.3 * t.exp()).log()
    return 0.3 * _kl(t, mixture) + 0.7 * _kl(s, mixture)


# of log-probabilities of teacher and student [n, w], fp64
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": _kl,
    "reverse_kl": lambda t, s: _kl(s, t),
    "jsd": _jsd,
}


def measure_distillation(setting: Setting) -> Iterator[Measurement]:
    """Each divergence, mixed with the labels' own loss; then a model as its own teacher."""
    inputs = make_inputs(LAYOUT, reference.IDS, seed=11)
    student, teacher = reference.random_model(MODEL), _teacher()
    for name, options in LOSSES.items():
        model = setting.ours_like(student).requires_grad_(True)
        objective = Distillation(
            setting.ours_like(teacher).eval(),
            read_distillation_loss({"name": name, **options}),
            chunk_rows=5,
        )
        loss = torch.zeros(())
        for batch in _batches(inputs):
            summed = objective(model, batch) / inputs.label_count
            summed.backward()
            loss = loss + summed.detach()
        right, gradients = _theirs(student, teacher, inputs, name, **options)
        yield Measurement(f"{name}: loss", abs(float(loss) / right - 1), TOLERANCE)
        worst = gradient_error(model, gradients)
        yield Measurement(f"{name}: {len(gradients)} gradients", worst, OF_GRADIENTS)
    for name in LOSSES:
        model = setting.ours_like(student)
        objective = Distillation(
            setting.ours_like(student).eval(),
            read_distillation_loss({"name": name, "kd_ratio": 1.0}),
            chunk_rows=5,
        )
        with torch.no_grad():
            apart = sum(float(objective(model, batch).abs()) for batch in _batches(inputs))
        yield Measurement(f"itself, {name}", apart / inputs.label_count, OF_ITSELF)


def _batches(inputs: Inputs) -> list[dict]:
    """A padded batch of two rows, and the others packed."""
    samples = [pairs.sample(inputs.row(index)) for index in range(len(LAYOUT))]
    padded = StepCollate(0, batch_size=2, pack_to=None)(samples[:2]).batches
    return padded + StepCollate(0, batch_size=1, pack_to=128)(samples[2:]).batches


def _teacher() -> nn.Module:
    """Another random model, whose vocabulary has more rows, with logits as large as the others."""
    model = copy.deepcopy(reference.random_model(MODEL, 1))
    model.resize_token_embeddings(model.config.get_text_config().vocab_size + ROWS_MORE)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[-ROWS_MORE:] = 2 * weight[:ROWS_MORE].roll(1, -1)
    return model


def _theirs(
    student: nn.Module, teacher: nn.Module, inputs: Inputs, name: str, **options: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the plain formula, in fp64 behind the models, each row alone."""
    temperature, ratio = options["temperature"], options["kd_ratio"]
    total = torch.zeros((), dtype=torch.float64)
    for row in map(inputs.row, range(len(LAYOUT))):
        labels = row.labels[0, 1:]
        kept = labels >= 0
        logits = student(**reference.forward_kwargs(row)).logits[0, :-1][kept].double()
        with torch.no_grad():
            judged = teacher(**reference.forward_kwargs(row)).logits[0, :-1][kept].double()
        rows = min(logits.shape[-1], judged.shape[-1])
        s, t = ((x[:, :rows] / temperature).log_softmax(-1) for x in (logits, judged))
        plain = nn.functional.cross_entropy(logits, labels[kept], reduction="sum")
        total = total + ratio * FORMULAS[name](t, s).sum() + (1 - ratio) * plain
    loss = total / inputs.label_count
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return float(loss.detach()), hf_to_tune(dict(zip(parameters, gradients, strict=True)))


DISTILL = Stage(
    name="distill",
    what="three divergences from a teacher with a larger vocabulary, mixed with the labels' own "
    "loss, and the gradient of every parameter against the plain formula with all logits; a model "
    "as its own teacher",
    tolerance=(
        f"{TOLERANCE:.0e} relative for losses, {OF_GRADIENTS:.0e} for gradients by Frobenius norm: "
        f"ten times the fp32 noise; {OF_ITSELF:.0e} nats a token from itself"
    ),
    fault="temperature missing",
    measure=measure_distillation,
)
