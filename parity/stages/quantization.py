"""NF4: what it costs in the model's predictions, against bf16 on the same inputs."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from parity import reference
from parity.inputs import LAYOUTS, Inputs, make_inputs
from parity.random_folder import rope, write_random
from parity.stages._stage import Measurement, Setting, Stage
from torchtune_qwen25vl import device
from torchtune_qwen25vl._model import Qwen25VL
from torchtune_qwen25vl._weight_files import find_weights

NATS = 0.06
BLOCKS = {  # layers that are whole blocks of NF4, 64 * 256 weights
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    **rope(64),
}


def measure_nf4(setting: Setting) -> Iterator[Measurement]:
    """Mean divergence of the distribution of the next token."""
    with tempfile.TemporaryDirectory() as scratch:
        if setting.checkpoint:
            folder, _ = find_weights(setting.checkpoint)
        else:
            folder = write_random(
                Path(scratch) / "model", text=BLOCKS, vision={}, dtype=torch.bfloat16
            )
        config = json.loads((folder / "config.json").read_text())
        plain, quantised = (_load(folder, four_bit=four_bit) for four_bit in (False, True))
    ids = {name: config[name] for name in reference.IDS}
    for layout in ("two images", "mixed batch", "video"):
        divergences = []
        for seed in range(1 if setting.small else 3):
            inputs = make_inputs(LAYOUTS[layout], ids, seed=seed)
            divergences.append(divergence(_logits(plain, inputs), _logits(quantised, inputs)))
        yield Measurement(layout, float(torch.cat(divergences).mean()), NATS)


def divergence(right: Tensor, other: Tensor) -> Tensor:
    """KL(right || other) for each row of logits [n, v], in nats, [n]."""
    p, q = (logits.double().log_softmax(-1) for logits in (right, other))
    return (p.exp() * (p - q)).sum(-1)


def _logits(model: Qwen25VL, inputs: Inputs) -> Tensor:
    with torch.inference_mode():
        return model(**inputs.ours)[inputs.attention_mask.bool()]  # [n, v]


def _load(folder: Path, *, four_bit: bool) -> Qwen25VL:
    choice = device.Choice(torch.device("cpu"), torch.bfloat16, "sdpa", four_bit, ())
    return device.load(folder, choice)


NF4 = Stage(
    name="NF4",
    what="mean KL divergence of our NF4 model from our bf16 model on the same inputs, in nats",
    tolerance=f"{NATS}: normal weights lose 9 % of their size in NF4, and nothing else may happen",
    fault="rows of NF4 weights displaced",
    measure=measure_nf4,
)
