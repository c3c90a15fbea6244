"""Twenty steps of training: Hugging Face with torch's AdamW and peft, and our training step."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from parity import pairs, reference
from parity.inputs import Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage, max_error, relative_frobenius
from torchtune_qwen25vl import Qwen25VL, hf_to_tune, qwen2_5_vl_from_config
from torchtune_qwen25vl.model import Library, part_of, products_by
from torchtune_qwen25vl.training import (
    Part,
    StepCollate,
    parameter_groups,
    train_step,
    trained_names,
    tuning,
)
from torchtune_qwen25vl.weights import tune_to_peft

MODEL = "tiny"
STEPS = 20
TOLERANCE = 1e-5
RATE, SLOW_RATE, DECAY = 1e-4, 5e-5, 0.5  # so much decay that losing it shows in three steps
RANK, ALPHA = 4, 8
ADAPTERS = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": RANK,
    "lora_alpha": ALPHA,
}

# Two batches a step, as gradient accumulation makes them: rows with images beside rows of text.
LAYOUT: list[list[list[int | tuple]]] = [
    [[4, (1, 6, 10), 9], [15]],
    [[2, (1, 4, 4), 3, (1, 8, 4), 7], [5, (1, 4, 6), 12]],
]


@dataclass(frozen=True)
class Case:
    """One way to train, on both sides."""

    name: str
    parts: dict[str, Part]
    packed: bool = False
    library: Library = "torch"  # by which ours multiplies

    @property
    def adapters(self) -> dict[str, Any]:
        """Options of the adapters, where there are any."""
        return ADAPTERS if self.parts["decoder"].train == "lora" else {}


EVERYTHING = {
    "vision": Part("full", lr=SLOW_RATE, weight_decay=0.0),
    "merger": Part("full", lr=RATE, weight_decay=DECAY),
    "decoder": Part("full", lr=RATE, weight_decay=DECAY),
}
ADAPTED = {**EVERYTHING, "vision": Part("frozen"), "decoder": Part("lora", lr=RATE)}
CASES = (
    Case("adapters and merger", ADAPTED),
    Case("packed", EVERYTHING, packed=True),
    Case("everything", EVERYTHING),
    Case("everything, by oneDNN", EVERYTHING, library="onednn"),
)


def measure_training(setting: Setting) -> Iterator[Measurement]:
    """Losses of all steps, and every trained weight after the last."""
    steps = 3 if setting.small else STEPS
    for case in CASES:
        data = [
            [_inputs(rows, case, 100 * step + j) for j, rows in enumerate(LAYOUT)]
            for step in range(steps)
        ]
        theirs = copy.deepcopy(reference.random_model(MODEL)).train()
        ours = qwen2_5_vl_from_config(
            reference.config_dict(theirs), **tuning(case.parts, case.adapters)
        )
        start = hf_to_tune(reference.disk_state_dict(theirs))
        start = {name: weight.clone() for name, weight in start.items()}
        ours.load_state_dict(start, strict=not case.adapters)
        if case.adapters:
            _adapt(theirs, ours)
        setting.faulty(ours)
        with products_by(case.library, always=True):
            our_losses = list(_train_ours(ours, case, data))
        yield from _frozen_weights(case, ours, start)
        their_losses = list(_train_theirs(theirs, case, data))
        both = zip(our_losses, their_losses, strict=True)
        error = max(abs(mine - their) / their for mine, their in both)
        yield Measurement(f"{case.name}: losses", error, TOLERANCE)
        yield from _compare_weights(case, ours, theirs)


def _inputs(rows: list[list[int | tuple]], case: Case, seed: int) -> Inputs:
    """A batch; where it is to be packed, every token of text is labelled, also the first."""
    inputs = make_inputs(rows, reference.IDS, seed=seed)
    if not case.packed:
        return inputs
    text = inputs.attention_mask.bool() & ~inputs.is_placeholder
    labels = inputs.tokens.masked_fill(~text, CROSS_ENTROPY_IGNORE_IDX)
    return replace(inputs, labels=labels)


def _adapt(theirs: nn.Module, ours: Qwen25VL) -> None:
    """Give their decoder peft's adapters, ours the same first values, and train their merger."""
    import peft

    targets = r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # the encoder has blocks
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    peft.inject_adapter_in_model(config, theirs)
    for name, parameter in theirs.named_parameters():
        if "visual.merger" in name:
            parameter.requires_grad_(True)
    weights = _trained_by_us(ours)  # they share the model's memory
    for name, first in _trained_by_them(theirs).items():
        weights[name].copy_(first)


def _trained_by_them(theirs: nn.Module) -> dict[str, Tensor]:
    trained = ((name, p) for name, p in theirs.named_parameters() if p.requires_grad)
    return {reference.since_4_52(name.replace(".default.", ".")): p.detach() for name, p in trained}


def _trained_by_us(ours: Qwen25VL) -> dict[str, Tensor]:
    """Adapters, and what is trained beside them, under the names that peft has for them."""
    state = ours.state_dict()
    trained = {name: state[name] for name in trained_names(ours)}
    weights, _ = tune_to_peft(trained, rank=RANK, alpha=ALPHA)
    return {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}


def _train_ours(model: Qwen25VL, case: Case, data: list[list[Inputs]]) -> Iterator[float]:
    optimizer = torch.optim.AdamW(parameter_groups(model, case.parts))
    for step in data:
        batches = [{**inputs.ours, "labels": inputs.labels} for inputs in step]
        if case.packed:
            rows = [inputs.row(index) for inputs in step for index in range(len(inputs.tokens))]
            samples = list(map(pairs.sample, rows))
            batches = StepCollate(0, batch_size=1, pack_to=64)(samples).batches
        yield train_step(model, optimizer, batches).loss


def _train_theirs(model: nn.Module, case: Case, data: list[list[Inputs]]) -> Iterator[float]:
    """As their Trainer does: the mean over the labels of all batches of a step."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        {
            "params": [parameter for name, parameter in trained if _part(name) == part],
            "lr": how.lr,
            "weight_decay": how.weight_decay or 0.0,
        }
        for part, how in case.parts.items()
        if how.train != "frozen"
    )
    for step in data:
        labels = sum(inputs.label_count for inputs in step)
        total = 0.0
        for inputs in step:
            loss = reference.step_loss(model, inputs, labels)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        yield total


def _part(their_name: str) -> str:
    if "visual.merger." in their_name:
        return "merger"
    return "vision" if "visual." in their_name else "decoder"


def _frozen_weights(case: Case, ours: Qwen25VL, start: dict[str, Tensor]) -> Iterator[Measurement]:
    """How far those weights moved that the case does not train in full."""
    state = ours.state_dict()
    frozen = [name for name in start if case.parts[part_of(name)].train != "full"]
    if frozen:
        moved = max(max_error(state[name], start[name]) for name in frozen)
        yield Measurement(f"{case.name}: frozen weights", moved)


def _compare_weights(case: Case, ours: Qwen25VL, theirs: nn.Module) -> Iterator[Measurement]:
    if case.adapters:
        mine, their = _trained_by_us(ours), _trained_by_them(theirs)
    else:
        mine, their = ours.state_dict(), hf_to_tune(reference.disk_state_dict(theirs))
    if mine.keys() != their.keys():
        yield Measurement(f"{case.name}: names", float("inf"))
        return
    k_bias = {name for name in mine if name.endswith("k_proj.bias")}
    worst = max(relative_frobenius(mine[name], their[name]) for name in mine.keys() - k_bias)
    yield Measurement(f"{case.name}: weights", worst, TOLERANCE)
    if k_bias:
        worst = max(max_error(mine[name], their[name]) for name in k_bias)
        yield Measurement(f"{case.name}: k bias", worst, RATE)


TRAINING = Stage(
    name="training",
    what=f"losses of {STEPS} accumulated AdamW steps and the weights after them; adapters: peft",
    tolerance=(
        f"{TOLERANCE:.0e} relative, weights by Frobenius norm: the fp32 noise of gradients, which "
        f"Adam passes on (measured: losses 3e-7, weights 2e-6). k bias: {RATE:.0e} absolute, one "
        "step's worth: softmax all but ignores it, so its gradient is mostly noise, and Adam moves "
        "it by the learning rate whatever the gradient's size"
    ),
    fault="first packed label kept",
    measure=measure_training,
)
