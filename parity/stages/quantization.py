"""NF4: what it costs in the model's predictions, against bf16 on the same inputs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchtune import utils
from torchtune.data import Message
from torchtune.modules.low_precision.nf4_linear import to_nf4

from parity import photos
from parity.random_folder import write_random
from parity.stages._stage import Measurement, Setting, Stage
from torchtune_qwen25vl import Qwen25VL, Qwen25VLTransform, device, padded_collate
from torchtune_qwen25vl.weights import find_weights

MORE = 1.25  # measured on random weights: 0.99 to 1.00
BLOCKS = {  # layers that are whole blocks of NF4, 64 * 256 weights
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
QUESTION = "Describe this image: its colours, its shapes, and where they are."


def measure_nf4(setting: Setting) -> Iterator[Measurement]:
    """Mean divergence of the distribution of the next token, over a photo and a question."""
    with tempfile.TemporaryDirectory() as scratch:
        if setting.checkpoint:
            folder, _ = find_weights(setting.checkpoint)
        else:
            folder = write_random(Path(scratch, "model"), text=BLOCKS, dtype=torch.bfloat16)
        plain, quantised = (_load(folder, setting, four_bit=four) for four in (False, True))
        setting.faulty(quantised)
        transform = Qwen25VLTransform.from_folder(folder, max_pixels=100_352)
    names = photos.PHOTOS[: 2 if setting.small else None]
    right, ours = (
        [_logits(model, transform, name) for name in names] for model in (plain, quantised)
    )
    _round(plain)
    rounded = [_logits(plain, transform, name) for name in names]
    for name, *logits in zip(names, right, ours, rounded, strict=True):
        cost, least = (float(divergence(logits[0], other).mean()) for other in logits[1:])
        yield Measurement(name, cost, MORE * least)


@torch.no_grad()
def _round(model: Qwen25VL) -> None:
    """Put every matrix of the decoder's layers through NF4 and back, in place."""
    for weight in model.layers.parameters():
        if weight.ndim == 2:
            weight.copy_(to_nf4(weight).get_original_weight())


def divergence(right: Tensor, other: Tensor) -> Tensor:
    """KL(right || other) for each row of logits [n, v], in nats, [n]."""
    p, q = (logits.double().log_softmax(-1) for logits in (right, other))
    return (p.exp() * (p - q)).sum(-1)


def _logits(model: Qwen25VL, transform: Qwen25VLTransform, name: str) -> Tensor:
    content = [
        {"type": "image", "content": photos.photo(name)},
        {"type": "text", "content": QUESTION},
    ]
    sample = transform({"messages": [Message("user", content)]}, inference=True)
    batch = padded_collate([sample], transform.pad_id, padding_side="left")
    utils.batch_to_device(batch, next(model.parameters()).device)
    with torch.inference_mode():
        return model(**batch)[0]  # [s, v]


def _load(folder: Path, setting: Setting, *, four_bit: bool) -> Qwen25VL:
    choice = device.Choice(
        torch.device(setting.device), torch.bfloat16, "sdpa", four_bit, "torch", ()
    )
    return device.load(folder, choice)


NF4 = Stage(
    name="NF4",
    what="mean KL divergence of our NF4 model from our bf16 model on the same inputs, in nats",
    tolerance=(
        f"{MORE} times what it costs to round the same matrices to NF4 and back, one by one: the "
        "rounding is the price, and nothing else may happen"
    ),
    fault="rows of NF4 weights displaced",
    measure=measure_nf4,
)
