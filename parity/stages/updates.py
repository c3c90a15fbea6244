"""Updates survive: weights move as far as in fp32, at the rates that the configs ship.

A weight in bf16 keeps 8 bits, and at the rates of fine-tuning most updates are below half of the
last one. Each part is trained for a few steps on one batch, from weights that bf16 holds exactly,
as `finetune` does in each precision; how far it went is measured along its update in fp32.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.optim import AdamW, Optimizer

import torchtune_qwen25vl
from parity import reference
from parity.inputs import LAYOUTS, make_inputs
from parity.stages._stage import Measurement, Setting, Stage
from torchtune_qwen25vl.model import part_of
from torchtune_qwen25vl.training import (
    Precision,
    StochasticAdamW,
    computed_in,
    parameter_groups,
    read_parts,
    summed_loss,
    train_step,
)

CONFIG = Path(torchtune_qwen25vl.__file__).parent / "recipes" / "configs" / "finetune_full.yaml"
STEPS = 10
OFF = 0.05  # of the way in fp32; stochastic rounding was measured to be off by 0.015 at most
TURNED = 0.02  # of the cosine, by products in bf16; 0.01 was measured
OPTIMIZERS: dict[Precision, Callable[..., Optimizer]] = {
    "bf16_stochastic": StochasticAdamW,
    "bf16_mixed": AdamW,
    "fp32": StochasticAdamW,
}


def measure_updates(setting: Setting) -> Iterator[Measurement]:
    """How far every part went, in every precision that trains parts in full."""
    right = _updates(setting, "fp32", AdamW)
    assert {*OPTIMIZERS, "bf16"} == {*get_args(Precision)}
    for precision, optimizer in OPTIMIZERS.items():
        for part, way in _updates(setting, precision, optimizer).items():
            share = float((way != 0).float().mean())
            gone = float((way * right[part]).sum() / right[part].square().sum())
            cosine = float(torch.cosine_similarity(way, right[part], dim=0))
            case = f"{precision}: {part}, {share:.0%} of its weights moved, cosine {cosine:.2f}"
            yield Measurement(case, abs(gone - 1), OFF)
            if precision != "bf16_stochastic":  # whose rounding is a walk at random
                yield Measurement(f"{precision}: {part}, direction", 1 - cosine, TURNED)


def _updates(
    setting: Setting, precision: Precision, optimizer: Callable[..., Optimizer]
) -> dict[str, Tensor]:
    """Train as the config of full fine-tuning says; by part, how far each weight went."""
    dtype = torch.bfloat16 if precision == "bf16_stochastic" else torch.float32
    model = setting.ours_like(reference.random_model("tiny")).to(torch.bfloat16).to(dtype).train()
    start = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
    made = optimizer(parameter_groups(model, read_parts(OmegaConf.load(CONFIG).parts)))
    loss = computed_in(precision, model.device, model, summed_loss)
    inputs = make_inputs(LAYOUTS["mixed batch"], reference.IDS)
    torch.manual_seed(0)
    for _ in range(STEPS):  # on one batch, so that the updates point one way
        train_step(model, made, [{**inputs.ours, "labels": inputs.labels}], loss=loss)
    ways: dict[str, list[Tensor]] = {}
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            way = weight.detach().float() - start[name]
            ways.setdefault(part_of(name), []).append(way.flatten())
    return {part: torch.cat(way) for part, way in ways.items()}


UPDATES = Stage(
    "updates survive",
    "how far weights move in each precision, at the shipped rates, against fp32",
    f"{OFF} of the way: rounding is random, and ten steps are few",
    "updates rounded to the nearest",
    measure_updates,
)
