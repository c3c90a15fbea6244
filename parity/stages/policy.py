"""Policy: what the sampler says of its tokens, what the trainer says, and the losses of groups."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from parity import pairs, reference
from parity.inputs import Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage, gradient_error, max_error
from torchtune_qwen25vl import hf_to_tune
from torchtune_qwen25vl.generation import Ended
from torchtune_qwen25vl.training import (
    GroupCollate,
    PolicyObjective,
    Sampler,
    StepBatches,
    advantages,
    answered,
    place_trees,
    read_policy_loss,
)

MODEL = "tiny"
TOLERANCE, OF_GRADIENTS = 1e-5, 1e-4
PROMPTS: list[list[int | tuple]] = [  # an image, none, two, a video
    [5, (1, 4, 6), 4],
    [6],
    [2, (1, 6, 8), 3, (1, 8, 4), 2],
    [3, (3, 4, 6, 1.0), 4],
]
ANSWERS, MAX_NEW_TOKENS, TEMPERATURE = 4, 7, 1.3
STOPS = tuple(range(0, 1000, 9))  # so that answers have several lengths
BANNED = (reference.IDS["image_token_id"], reference.IDS["video_token_id"])
LOSSES: dict[str, dict[str, float]] = {
    "grpo": {"clip_low": 0.1, "clip_high": 0.3, "beta": 0.2},
    "dr_grpo": {"clip_low": 0.2},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"clip_low": 0.05, "beta": 0.1},
}

Groups = list[list[Ended]]


def measure_policy(setting: Setting) -> Iterator[Measurement]:
    """Draw groups; hold the sampler against both trainers; then each loss and its gradients."""
    student, other = (reference.random_model(MODEL, seed) for seed in (0, 1))
    prompts = [
        pairs.sample(make_inputs([parts], reference.IDS, seed=k)) for k, parts in _numbered()
    ]
    model = setting.ours_like(student)
    groups = _draw(model, prompts)
    data = _batches(prompts, groups)
    said = _padded([ended.log_probs for group in groups for ended in group])
    ours = _by_trainer(model, data)
    theirs = _their_log_probs(student, groups).detach()
    yield Measurement("sampler against trainer", max_error(said, ours), TOLERANCE)
    yield Measurement("sampler against transformers", max_error(said, theirs), 5 * TOLERANCE)
    worth = advantages(_rewards(), "group", torch.device("cpu"))
    yield Measurement("advantages", max_error(worth, _their_advantages()), TOLERANCE)
    for name, options in LOSSES.items():
        model = setting.ours_like(student).requires_grad_(True)
        objective = _objective(name, setting.ours_like(other).eval(), **options)
        loss = torch.zeros(())
        for number, batch in enumerate(data.batches):
            before = _before(theirs)[_rows(batch)]
            objective.before[number] = before[:, : batch["sampled"].shape[1]].float()
            summed = objective(model, {**batch, "number": number}) / _count(name, theirs)
            summed.backward()
            loss = loss + summed.detach()
        right, gradients = _theirs(name, student, other, groups, **options)
        yield Measurement(f"{name}: loss", max_error(loss, right), TOLERANCE)
        worst = gradient_error(model, gradients)
        yield Measurement(f"{name}: {len(gradients)} gradients", worst, OF_GRADIENTS)


def _numbered() -> list[tuple[int, list[int | tuple]]]:
    return [(40 + k, parts) for k, parts in enumerate(PROMPTS)]


def _draw(model: nn.Module, prompts: Sequence[dict]) -> Groups:
    sampler = Sampler(
        pad_id=0,
        stop_tokens=STOPS,
        banned=BANNED,
        temperature=TEMPERATURE,
        answers=ANSWERS,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=3,
    )
    return sampler(model, prompts, range(len(prompts)))  # type: ignore[arg-type]


def _batches(prompts: Sequence[dict], groups: Groups) -> StepBatches:
    """Two batches of two padded trees."""
    worth = advantages(_rewards(), "group", torch.device("cpu"))
    samples = [
        {
            "answers": [answered(prompt, ended, counted=True) for ended in group],
            "advantages": own,
            "sampled": [ended.log_probs for ended in group],
        }
        for prompt, group, own in zip(prompts, groups, worth, strict=True)
    ]
    collate = GroupCollate(0, BANNED, batch_size=2, pack_to=None, across_batches=False)
    data = collate(samples)
    place_trees(data, torch.device("cpu"))
    return data


def _objective(name: str, other: nn.Module | None, **options: float) -> PolicyObjective:
    return PolicyObjective(
        read_policy_loss({"name": name, **options}),
        temperature=TEMPERATURE,
        banned=BANNED,
        answers=ANSWERS,
        max_new_tokens=MAX_NEW_TOKENS,
        reference=other,  # type: ignore[arg-type]
        frozen_media=False,
        chunk_rows=5,
    )


@torch.no_grad()
def _by_trainer(model: nn.Module, data: StepBatches) -> Tensor:
    """What the objective makes of the tokens, [answers, m]."""
    objective = _objective("grpo", None)
    for number, batch in enumerate(data.batches):
        objective(model, {**batch, "number": number})  # type: ignore[arg-type]
    return _padded([row.tolist() for rows in objective.before.values() for row in rows])


def _rewards() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(len(PROMPTS), ANSWERS, generator=generator)


def _their_advantages() -> Tensor:
    rows = [torch.tensor(row, dtype=torch.float64) for row in _rewards().tolist()]
    return torch.stack([(row - row.mean()) / (row.std() + 1e-4) for row in rows])


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor([[*row, *[0.0] * (MAX_NEW_TOKENS - len(row))] for row in rows])


def _rows(batch: dict) -> Tensor:
    """Numbers of the answers of a batch among all of them."""
    first = ANSWERS * batch["samples"][:, None]
    return (first + torch.arange(ANSWERS)).flatten()


def _before(theirs: Tensor) -> Tensor:
    """Log-probabilities of a policy that is some steps older, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(9)
    older = theirs + 0.3 * torch.randn(theirs.shape, generator=generator).double()
    return torch.where(theirs != 0, older, 0)


def _their_log_probs(model: nn.Module, groups: Groups) -> Tensor:
    """Log-probability of each token by the sampler's rules, each row alone, fp64 [answers, m]."""
    found = []
    for (seed, parts), group in zip(_numbered(), groups, strict=True):
        for ended in group:
            row = make_inputs([[*parts, len(ended.tokens)]], reference.IDS, seed=seed)
            found.append(_of_answer(model, row, torch.tensor(ended.tokens)))
    return torch.stack(found)


def _of_answer(model: nn.Module, row: Inputs, answer: Tensor) -> Tensor:
    row.tokens[0, -len(answer) :] = answer
    logits = model(**reference.forward_kwargs(row)).logits[0, -len(answer) - 1 : -1].double()
    scores = (logits / TEMPERATURE).index_fill(-1, torch.tensor(BANNED), -torch.inf)
    values = scores.log_softmax(-1).gather(-1, answer[:, None])[:, 0]
    return nn.functional.pad(values, (0, MAX_NEW_TOKENS - len(answer)))


def _count(name: str, log_probs: Tensor) -> int:
    return int((log_probs != 0).sum()) if name == "dapo" else len(log_probs)


Aggregate = Callable[[Tensor, Tensor], Tensor]  # of losses [a, m] and which are tokens, to a sum
AGGREGATES: dict[str, Aggregate] = {
    "grpo": lambda x, is_token: (x.sum(1) / is_token.sum(1)).sum(),
    "dr_grpo": lambda x, is_token: x.sum() / MAX_NEW_TOKENS,
    "dapo": lambda x, is_token: x.sum(),
    "gspo": lambda x, is_token: (x.sum(1) / is_token.sum(1)).sum(),
}


def _theirs(
    name: str, student: nn.Module, other: nn.Module, groups: Groups, **options: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by the plain formula, in fp64 behind the model."""
    policy = _their_log_probs(student, groups)
    is_token = policy != 0
    log_ratio = policy - _before(policy.detach())
    if name == "gspo":
        log_ratio = (log_ratio.sum(1) / is_token.sum(1))[:, None].expand_as(policy)
    worth = _their_advantages().view(-1, 1)
    low, high = options["clip_low"], options.get("clip_high", options["clip_low"])
    ratio = log_ratio.exp()
    losses = -torch.minimum(ratio * worth, ratio.clamp(1 - low, 1 + high) * worth)
    if options.get("beta"):
        with torch.no_grad():
            apart = _their_log_probs(other, groups)
        apart = apart - policy
        losses = losses + options["beta"] * (apart.exp() - apart - 1)
    loss = AGGREGATES[name](losses * is_token, is_token) / _count(name, policy)
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return float(loss.detach()), hf_to_tune(dict(zip(parameters, gradients, strict=True)))


POLICY = Stage(
    name="policy",
    what="log-probabilities of drawn tokens by sampler, trainer and transformers; advantages; four "
    "losses of groups and the gradient of every parameter against their plain formulas",
    tolerance=(
        f"{TOLERANCE:.0e} for log-probabilities and losses (five times that between sampler and "
        f"transformers, whose logits differ by 3e-5 at most), {OF_GRADIENTS:.0e} for gradients by "
        "Frobenius norm: ten times the fp32 noise"
    ),
    fault="sampler's positions on one axis",
    measure=measure_policy,
)
