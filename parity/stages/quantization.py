"""Weights in 4 bits: what they cost in the model's predictions, against bf16 on the same inputs.

Of int4, whose kernels are given codes in an order of their own, every weight is compared too.

Shapes: o out_dim, i in_dim, g groups of a row.
"""

import tempfile
from collections.abc import Callable, Iterator
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
from torchtune_qwen25vl.device._choice import Format
from torchtune_qwen25vl.model import Int4Linear
from torchtune_qwen25vl.weights import find_weights

MORE = 1.25  # measured on random weights: 0.99 to 1.00
BLOCKS = {  # layers that are whole blocks of NF4, 64 * 256 weights
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
QUESTION = "Describe this image: its colours, its shapes, and where they are."
GROUP = 64  # weights of int4 that share a scale and a zero point
ROUNDED = 2**-7  # of the largest: it is rounded to bf16, and again with its bias


def measure_nf4(setting: Setting) -> Iterator[Measurement]:
    """Mean divergence of the distribution of the next token, over a photo and a question."""
    plain, quantised, transform = _models(setting, "nf4")
    yield from _costs(
        setting, plain, quantised, transform, lambda weight: to_nf4(weight).get_original_weight()
    )


def measure_int4(setting: Setting) -> Iterator[Measurement]:
    """Weights and products of each linear layer of the first block; then as NF4."""
    plain, quantised, transform = _models(setting, "int4")
    for name, layer in quantised.layers[0].named_modules():
        if isinstance(layer, Int4Linear):
            yield from _compare(name, layer, plain.layers[0].get_parameter(f"{name}.weight"))
    yield from _costs(setting, plain, quantised, transform, _nearest)


@torch.no_grad()
def _compare(name: str, layer: Int4Linear, weight: Tensor) -> Iterator[Measurement]:
    """Compare what a layer in int4 does with its weight's nearest values.

    As far from the weight as the nearest value: where two are equally near, either is right.
    """
    right, exact = _nearest(weight), weight.double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    eye = torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)
    found = (layer(eye).double() - bias).T
    error = ((found - exact).abs() - (right - exact).abs()).abs().max() / exact.abs().max()
    yield Measurement(f"{name}, weights", float(error), ROUNDED)
    torch.manual_seed(0)
    x = torch.randn(1, layer.in_features).to(eye)
    product = x.double() @ right.T + bias
    error = (layer(x).double() - product).abs().max() / product.abs().max()
    yield Measurement(f"{name}, a row", float(error), ROUNDED)


def _nearest(weight: Tensor) -> Tensor:
    """Return the nearest of the 16 values of each group of a weight, fp64 [o, i]."""
    grouped = weight.double().unflatten(1, (-1, GROUP))  # [o, g, GROUP]
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((most - least) / 15).to(weight.dtype).double()
    zero_point = (least + 8 * scale).to(weight.dtype).double()
    codes = ((grouped - zero_point) / scale).round().clamp(-8, 7)
    return (codes * scale + zero_point).flatten(1)


def _costs(
    setting: Setting,
    plain: Qwen25VL,
    quantised: Qwen25VL,
    transform: Qwen25VLTransform,
    rounded: Callable[[Tensor], Tensor],
) -> Iterator[Measurement]:
    """Compare what 4 bits cost with what rounding the same matrices does; `plain` is changed."""
    names = photos.PHOTOS[: 2 if setting.small else None]
    right, ours = (
        [_logits(model, transform, name) for name in names] for model in (plain, quantised)
    )
    _round(plain, rounded)
    least = [_logits(plain, transform, name) for name in names]
    for name, *logits in zip(names, right, ours, least, strict=True):
        cost, price = (float(divergence(logits[0], other).mean()) for other in logits[1:])
        yield Measurement(name, cost, MORE * price)


@torch.no_grad()
def _round(model: Qwen25VL, rounded: Callable[[Tensor], Tensor]) -> None:
    """Put every matrix of the decoder's layers through 4 bits and back, in place."""
    for weight in model.layers.parameters():
        if weight.ndim == 2:
            weight.copy_(rounded(weight))


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


def _models(setting: Setting, four_bit: Format) -> tuple[Qwen25VL, Qwen25VL, Qwen25VLTransform]:
    """Return a model in bf16, the same in 4 bits with the fault, if any, and their transform."""
    with tempfile.TemporaryDirectory() as scratch:
        if setting.checkpoint:
            folder, _ = find_weights(setting.checkpoint)
        else:
            folder = write_random(Path(scratch, "model"), text=BLOCKS, dtype=torch.bfloat16)
        plain, quantised = (_load(folder, setting, held) for held in (None, four_bit))
        transform = Qwen25VLTransform.from_folder(folder, max_pixels=100_352)
    return plain, setting.faulty(quantised), transform


def _load(folder: Path, setting: Setting, four_bit: Format | None) -> Qwen25VL:
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
INT4 = Stage(
    name="int4",
    what="weights and products of our int4 layers, of the largest, and the divergence as of NF4",
    tolerance=(
        f"{ROUNDED} of the largest, as both are rounded to bf16, and again with the bias; of the "
        f"divergence {MORE} times what plain rounding costs"
    ),
    fault="zero points of int4 displaced",
    measure=measure_int4,
)
