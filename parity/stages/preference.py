"""Preference: losses and gradients against plain formulas, and ten steps of DPO against TRL's."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from parity import pairs, reference
from parity.inputs import Inputs
from parity.stages._stage import (
    Measurement,
    Setting,
    Stage,
    gradient_error,
    refused,
    relative_frobenius,
)
from torchtune_qwen25vl import Qwen25VL, hf_to_tune, qwen2_5_vl_from_config
from torchtune_qwen25vl.training import (
    Objective,
    Part,
    StepBatches,
    TreeCollate,
    parameter_groups,
    place_trees,
    read_loss,
    train_step,
    trained_names,
    tuning,
)
from torchtune_qwen25vl.weights import tune_to_peft

MODEL = "tiny"
STEPS, BATCH = 10, 2
TOLERANCE, OF_GRADIENTS = 1e-5, 1e-4
BETA, RATE, RANK, ALPHA = 0.1, 1e-2, 4, 8
TARGETS = r".*language_model.*\.(self_attn|mlp)\.\w+_proj"
PARTS = {"vision": Part("frozen"), "merger": Part("frozen"), "decoder": Part("lora", lr=RATE)}
ADAPTERS = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
}
LIKED = (True, False, True, True)
SIGMOID = torch.nn.functional.logsigmoid

# c, r: log-probabilities of both answers; c0, r0 those of the reference; n, m tokens; all [t], fp64
Formula = Callable[..., Tensor]


def _odds(mean: Tensor) -> Tensor:
    return mean - (1 - mean.exp()).log()


def _kto(c: Tensor, r: Tensor, c0: Tensor, r0: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """Answers are moved on within batches of two rows."""
    divergence = (r - r0).detach().view(-1, BATCH).mean(1).clamp(min=0).repeat_interleave(BATCH)
    sign = torch.where(torch.tensor(LIKED), 1.0, -1.0)
    weight = torch.where(torch.tensor(LIKED), 1.0, 1.5)
    return weight * (1 - (0.3 * sign * (c - c0 - divergence)).sigmoid())


FORMULAS: dict[str, tuple[dict[str, float], Formula]] = {
    "dpo": (
        {"beta": 0.3, "label_smoothing": 0.1},
        lambda c, r, c0, r0, n, m: (
            -(0.9 * SIGMOID(0.3 * (c - r - c0 + r0)) + 0.1 * SIGMOID(-0.3 * (c - r - c0 + r0)))
        ),
    ),
    "ipo": (
        {"beta": 0.2},
        lambda c, r, c0, r0, n, m: ((c - c0) / n - (r - r0) / m - 2.5) ** 2,
    ),
    "hinge": (
        {"beta": 0.05},
        lambda c, r, c0, r0, n, m: (1 - 0.05 * (c - r - c0 + r0)).clamp(min=0),
    ),
    "simpo": (
        {"beta": 2.0, "gamma": 0.7},
        lambda c, r, c0, r0, n, m: -SIGMOID(2 * (c / n - r / m) - 0.7),
    ),
    "orpo": (
        {"beta": 0.4},
        lambda c, r, c0, r0, n, m: -c / n - 0.4 * SIGMOID(_odds(c / n) - _odds(r / m)),
    ),
    "mpo": (
        {"beta": 0.1, "preference_weight": 0.7, "quality_weight": 0.4, "sft_weight": 0.5},
        lambda c, r, c0, r0, n, m: (
            -0.7 * SIGMOID(0.1 * (c - r - c0 + r0))
            - 0.4 * (SIGMOID(0.1 * (c - c0)) + SIGMOID(-0.1 * (r - r0)))
            - 0.5 * c / n
        ),
    ),
    "kto": ({"beta": 0.3, "undesirable_weight": 1.5}, _kto),
}


def measure_preference(setting: Setting) -> Iterator[Measurement]:
    """Each loss on one batch; log-probabilities; then the steps."""
    for name in FORMULAS:
        yield from _one_loss(name, setting)
    for case, layouts in (("text", pairs.TEXT), ("images", pairs.IMAGES)):
        yield from _steps(case, layouts, setting)


def _one_loss(name: str, setting: Setting) -> Iterator[Measurement]:
    """Loss, log-probabilities and every gradient, all of the model trained, another as reference.

    A batch of two rows at a time, as the loss kto needs it.
    """
    options, _ = FORMULAS[name]
    theirs, other = (reference.random_model(MODEL, seed) for seed in (0, 1))
    model = setting.ours_like(theirs).requires_grad_(True)
    objective = Objective(
        read_loss({"name": name, **options}),
        paired=name != "kto",
        has_reference=name not in ("simpo", "orpo"),
        reference=setting.ours_like(other).eval(),
        frozen_media=False,
        chunk_rows=7,
    )
    made = pairs.make_pairs(pairs.IMAGES, reference.IDS, seed=3)
    samples = pairs.samples(made)
    if name == "kto":
        samples = [
            {**pairs.sample(pair.chosen), "liked": liked}
            for pair, liked in zip(made, LIKED, strict=True)
        ]
    loss = torch.zeros(())
    for batch in _batches(samples, paired=name != "kto").batches:
        summed = objective(model, batch) / len(samples)
        summed.backward()
        loss = loss + summed.detach()
    figures = objective.figures.report(torch.device("cpu"))
    right = _their_loss(name)
    yield Measurement(f"{name}: loss", abs(float(loss) / right["loss"] - 1), TOLERANCE)
    for key in ("logps/chosen", "logps/rejected"):
        error = abs(figures[key] / right[key] - 1)
        yield Measurement(f"{name}: {key}", error, TOLERANCE)
    worst = gradient_error(model, right["gradients"])
    yield Measurement(f"{name}: {len(right['gradients'])} gradients", worst, OF_GRADIENTS)


def _batches(samples: Sequence[dict], *, paired: bool = True, frozen: bool = False) -> StepBatches:
    """Our batches of two trees; the images of a step are kept where the encoder is frozen."""
    ids = (reference.IDS["image_token_id"], reference.IDS["video_token_id"])
    collate = TreeCollate(
        0, ids, batch_size=BATCH, pack_to=None, paired=paired, across_batches=frozen
    )
    data = collate(samples)
    place_trees(data, torch.device("cpu"))
    return data


@functools.cache
def _their_answers(seed: int, *, paired: bool) -> Tensor:
    """Log-probability of each answer in a row of its own, from all logits, fp64 [t, 2]."""
    model = reference.random_model(MODEL, seed)
    made = pairs.make_pairs(pairs.IMAGES, reference.IDS, seed=3)
    others = [pair.rejected for pair in made]
    if not paired:  # the answer of the row before, or the last one, of a batch of two
        others = [pairs.moved(made[k ^ 1].chosen, pair.chosen) for k, pair in enumerate(made)]
    rows = zip((pair.chosen for pair in made), others, strict=True)
    return torch.stack([torch.stack([_their_log_prob(model, row) for row in two]) for two in rows])


def _their_log_prob(model: nn.Module, row: Inputs) -> Tensor:
    logits = model(**reference.forward_kwargs(row)).logits[0, :-1].double()
    labels = row.labels[0, 1:]
    kept = labels != CROSS_ENTROPY_IGNORE_IDX
    return logits[kept].log_softmax(-1).gather(-1, labels[kept, None]).sum()


@functools.cache
def _their_loss(name: str) -> dict:
    """Loss, figures and gradients by the plain formula, in fp64 behind the model."""
    paired = name != "kto"
    policy = _their_answers(0, paired=paired)
    with torch.no_grad():
        against = _their_answers(1, paired=paired)
    made = pairs.make_pairs(pairs.IMAGES, reference.IDS, seed=3)
    sides = zip(*made, strict=True)
    n, m = (torch.tensor([int((row.labels >= 0).sum()) for row in side]) for side in sides)
    _, formula = FORMULAS[name]
    loss = formula(*policy.unbind(1), *against.unbind(1), n, m).mean()
    parameters = dict(reference.random_model(MODEL, 0).named_parameters())
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), materialize_grads=True, retain_graph=True
    )
    liked = torch.tensor(LIKED)
    chosen, rejected = policy.unbind(1) if paired else (policy[liked, 0], policy[~liked, 0])
    return {
        "loss": float(loss.detach()),
        "logps/chosen": float(chosen.detach().mean()),
        "logps/rejected": float(rejected.detach().mean()),
        "gradients": hf_to_tune(dict(zip(parameters, gradients, strict=True))),
    }


def _steps(case: str, layouts: list[pairs.Layout], setting: Setting) -> Iterator[Measurement]:
    """Adapters trained by both for ten steps of two pairs, the reference without them."""
    made = [pairs.make_pairs(layouts, reference.IDS, seed=5)[k : k + BATCH] for k in (0, BATCH)]
    data = [made[step % len(made)] for step in range(STEPS)]
    title = f"ten steps of TRL, {case}"
    try:
        theirs = reference.ask(_trained_by_them, case)
    except reference.RefusalError as refusal:
        yield refused(title, refusal)
        return
    start = hf_to_tune(reference.disk_state_dict(reference.random_model(MODEL)))
    config = reference.config_dict(reference.random_model(MODEL))
    model = qwen2_5_vl_from_config(config, **tuning(PARTS, ADAPTERS))
    model.load_state_dict({name: weight.clone() for name, weight in start.items()}, strict=False)
    adapters = _adapters(model)  # they share the model's memory
    for name, first in theirs.first.items():
        adapters[name].copy_(first)
    setting.faulty(model)
    objective = Objective(
        read_loss({"name": "dpo", "beta": BETA}),
        paired=True,
        has_reference=True,
        reference=None,
        frozen_media=True,
        chunk_rows=1024,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, PARTS))
    worst: dict[str, float] = {}
    for step, right in zip(data, theirs.logged, strict=True):
        objective.begin_step()
        batches = _batches(pairs.samples(step), frozen=True).batches
        loss = train_step(model, optimizer, batches, loss=objective, count=objective.count).loss
        figures = {"loss": loss, **objective.figures.report(torch.device("cpu"))}
        for key in ("loss", "logps/chosen", "logps/rejected"):
            error = abs(figures[key] / right[key] - 1)
            worst[key] = max(worst.get(key, 0.0), error)
        error = abs(figures["rewards/margins"] - right["rewards/margins"])
        worst["rewards/margins"] = max(worst.get("rewards/margins", 0.0), error)
    for key, error in worst.items():
        yield Measurement(f"{title}: {key}", error, TOLERANCE)
    last = _adapters(model)
    error = max(relative_frobenius(last[name], weight) for name, weight in theirs.last.items())
    yield Measurement(f"{title}: {len(last)} adapters", error, OF_GRADIENTS)


def _adapters(model: Qwen25VL) -> dict[str, Tensor]:
    """Adapters under the names that peft has for them."""
    state = model.state_dict()
    trained = {name: state[name] for name in trained_names(model)}
    weights, _ = tune_to_peft(trained, rank=RANK, alpha=ALPHA)
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


@functools.cache
def _trained_by_them(case: str) -> reference.TrainedPreference:
    layouts = pairs.TEXT if case == "text" else pairs.IMAGES
    made = pairs.make_pairs(layouts, reference.IDS, seed=5)
    batches = [pairs.their_batch(made[k : k + BATCH], reference.IDS) for k in (0, BATCH)]
    return reference.train_preference(
        copy.deepcopy(reference.random_model(MODEL)),
        [batches[step % len(batches)] for step in range(STEPS)],
        beta=BETA,
        rate=RATE,
        rank=RANK,
        alpha=ALPHA,
        targets=TARGETS,
    )


PREFERENCE = Stage(
    name="preference",
    what="seven losses of preference and the gradient of every parameter against their plain "
    "formulas; ten steps of DPO against TRL's trainer, adapters: peft",
    tolerance=(
        f"{TOLERANCE:.0e} relative for losses and log-probabilities, {OF_GRADIENTS:.0e} for "
        "gradients and adapters by Frobenius norm: ten times the fp32 noise"
    ),
    fault="answers on one axis",
    measure=measure_preference,
)
