"""Preference, distillation and rollouts: ours and plain loops of transformers and peft.

The plain loops are what documentation shows: both answers of a pair in rows of their own, each with
the image, by the policy and again with its adapters off; all logits of student and teacher; eight
sampled continuations by `generate(num_return_sequences=8)`. Rates are 0, so that both sides can
share weights. Memory counts what a step needs beyond the weights.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parity import pairs, reference
from parity.bench import Row, as_in_training, compare
from parity.bench.memory import peak_memory
from parity.bench.training import NARROW, PICTURE, WIDE
from parity.inputs import Inputs, make_inputs
from parity.trace import ours_like
from torchtune_qwen25vl import Qwen25VL, hf_to_tune, qwen2_5_vl_from_config
from torchtune_qwen25vl.training import (
    Distillation,
    Objective,
    Part,
    Sampler,
    StepCollate,
    TreeCollate,
    parameter_groups,
    place_trees,
    read_distillation_loss,
    read_loss,
    train_step,
    tuning,
)
from torchtune_qwen25vl.weights import compute_frequencies

ANSWER, GROUP, BETA, RANK = 60, 8, 0.1, 16
TEXT = 80  # tokens before the image
REPEATS = {NARROW: 5, WIDE: 1}
MODULES = ["q_proj", "k_proj", "v_proj", "output_proj"]
Work = Callable[[], object]


def rows() -> Iterator[Row]:
    """A step of each, and a group of rollouts, for narrow layers and for 3B's width."""
    for name in (NARROW, WIDE):
        yield _row(f"{name}: DPO, a pair, LoRA", name, _our_dpo(name), _their_dpo(name))
        yield _row(f"{name}: distillation", name, _our_distillation(name), _their_loop(name))
        yield _row(f"{name}: {GROUP} rollouts", name, _our_group(name), _their_group(name))


def _row(case: str, name: str, ours: Work, theirs: Work) -> Row:
    threads, ours = torch.get_num_threads(), as_in_training(ours)
    milliseconds = compare(ours, theirs, repeats=REPEATS[name], threads=threads)
    memory = [peak_memory(work) / 2**20 for work in (ours, theirs)]
    note = f"peak {memory[0]:.0f} and {memory[1]:.0f} MiB, {memory[0] / memory[1]:.2f}x"
    return Row(case, threads, *milliseconds, note)


def _pair() -> list[pairs.Pair]:
    return pairs.make_pairs([([TEXT, PICTURE, 4], ANSWER, ANSWER, False)], reference.IDS, seed=1)


def _our_dpo(name: str) -> Work:
    theirs = reference.random_model(name)
    parts = {"vision": Part("frozen"), "merger": Part("frozen"), "decoder": Part("lora", lr=0.0)}
    adapters = {"lora_attn_modules": MODULES, "apply_lora_to_mlp": True, "lora_rank": RANK}
    options = tuning(parts, {**adapters, "lora_alpha": RANK})
    with torch.device("meta"):
        model = qwen2_5_vl_from_config(reference.config_dict(theirs), **options)
    weights = hf_to_tune(reference.disk_state_dict(theirs))
    model.load_state_dict(weights, strict=False, assign=True)
    _materialize(model)
    objective = Objective(
        read_loss({"name": "dpo", "beta": BETA}),
        paired=True,
        has_reference=True,
        reference=None,
        frozen_media=True,
        chunk_rows=1024,
    )
    ids = (reference.IDS["image_token_id"], reference.IDS["video_token_id"])
    collate = TreeCollate(0, ids, batch_size=1, pack_to=None, across_batches=True)
    data = collate(pairs.samples(_pair()))
    place_trees(data, torch.device("cpu"))
    optimizer = torch.optim.SGD(parameter_groups(model, parts), lr=0.0)

    def step() -> object:
        objective.begin_step()
        return train_step(model, optimizer, data.batches, loss=objective, count=objective.count)

    return step


def _materialize(model: Qwen25VL) -> None:
    """Fill what a checkpoint does not hold: adapters, and frequencies of rotations."""
    made = {
        name: torch.randn(weight.shape) * (0.0 if "lora_b" in name else 0.02)
        for name, weight in model.named_parameters()
        if weight.is_meta
    }
    model.load_state_dict(made, strict=False, assign=True)
    compute_frequencies(model, torch.device("cpu"))


def _their_dpo(name: str) -> Work:
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=r".*language_model.*\.(self_attn|mlp)\.\w+_proj"
    )
    model: Any = peft.get_peft_model(copy.deepcopy(reference.random_model(name)), config)
    batch = pairs.their_batch(_pair(), reference.IDS)
    answered = batch.pop("completion_mask")[:, 1:].bool()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)

    def log_probs() -> Tensor:
        logits = model(**batch).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (chosen * answered).sum(1)

    def step() -> float:
        with torch.no_grad(), model.disable_adapter():
            against = log_probs()
        margin = log_probs() - against
        loss = -nn.functional.logsigmoid(BETA * (margin[0] - margin[1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _asked() -> Inputs:
    return make_inputs([[TEXT, PICTURE, ANSWER]] * 2, reference.IDS, seed=2)


def _our_distillation(name: str) -> Work:
    student, teacher = (ours_like(reference.random_model(name, seed)) for seed in (0, 1))
    student.train()
    _freeze(student, "vision.")
    inputs = _asked()
    samples = [pairs.sample(inputs.row(k)) for k in range(len(inputs.tokens))]
    data = StepCollate(0, batch_size=2, pack_to=None)(samples)
    objective = Distillation(
        teacher.eval(), read_distillation_loss({"kd_ratio": 1.0}), chunk_rows=64
    )
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    return lambda: train_step(student, optimizer, data.batches, loss=objective)


def _their_loop(name: str) -> Work:
    student, teacher = (reference.random_model(name, seed) for seed in (0, 1))
    _freeze(student, "model.visual.")
    inputs = _asked()
    kwargs, labelled = reference.forward_kwargs(inputs), inputs.labels[:, 1:] >= 0
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)

    def step() -> float:
        with torch.no_grad():
            theirs = teacher(**kwargs).logits[:, :-1].log_softmax(-1)
        own = student(**kwargs).logits[:, :-1].log_softmax(-1)
        apart = nn.functional.kl_div(own, theirs, log_target=True, reduction="none").sum(-1)
        loss = apart[labelled].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _freeze(model: nn.Module, prefix: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(prefix))


def _prompt() -> Inputs:
    return make_inputs([[TEXT, PICTURE, 4]], reference.IDS, seed=3)


def _our_group(name: str) -> Work:
    model = ours_like(reference.random_model(name)).train()
    sampler = Sampler(
        pad_id=0,
        stop_tokens=(),
        banned=(reference.IDS["image_token_id"],),
        temperature=1.0,
        answers=GROUP,
        max_new_tokens=ANSWER,
        seed=0,
    )
    return lambda: sampler(model, [pairs.sample(_prompt())], [0])


def _their_group(name: str) -> Work:
    model = reference.random_model(name)
    kwargs = reference.forward_kwargs(_prompt())
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": GROUP}
    lengths = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER}
    banned = [reference.IDS["image_token_id"]]
    return lambda: model.generate(**kwargs, **options, **lengths, suppress_tokens=banned)
