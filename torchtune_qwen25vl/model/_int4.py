"""Decoder layers held in int4, which torch's kernels multiply by without unpacking the weight.

Each group of 64 weights of a row has 16 evenly spaced values, from its smallest to its largest:
`(code - 8) * scale + zero_point`, as torchao's "tinygemm" has them. NF4 takes 4.1 bits a weight in
place of 4.5, and loses as much, but is unpacked to full size in every product.

Shapes: n rows, o out_dim, i in_dim, g groups of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchtune_qwen25vl.model._decoder import Qwen25VL
from torchtune_qwen25vl.model._products import Linear

GROUP = 64  # weights that share a scale and a zero point; the kernels also take 32, 128 and 256
TILE = {"in_features": 128, "out_features": 16}  # what the kernels of a GPU and of a CPU step by
BLOCK = 2**22  # weights that are coded together, in fp32 meanwhile
INNER_TILES = 8  # of 16 weights, side by side on a GPU: a load of 16 bytes


class Int4Linear(nn.Module):
    """A frozen linear layer in int4, empty until it is given its weight; it computes in bf16.

    Its weight lies as the device's kernel reads it: it can neither be moved nor trained nor saved.

    Args:
        in_features: width of the input, whole tiles of 128
        out_features: width of the output, whole tiles of 16
        bias: whether the layer has one

    Raises:
        ValueError: if the widths are not whole tiles.
    """

    weight: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        if any(getattr(self, name) % size for name, size in TILE.items()):
            raise ValueError(
                f"a layer in int4 has inputs in multiples of {TILE['in_features']} and outputs in "
                f"multiples of {TILE['out_features']}, got {in_features} and {out_features}"
            )
        for name in ("weight", "scales"):
            self.register_buffer(name, torch.empty(0, device="meta"), persistent=False)
        empty = torch.empty(out_features, device="meta")
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Quantise the weight, bf16 [o, i], on the device that it is on."""
        parts = [_coded(part) for part in weight.split(max(BLOCK // self.in_features, 1))]
        codes = torch.cat([codes for codes, _ in parts])  # [o, i]
        self.scales = torch.cat([scales for _, scales in parts], dim=1)  # [g, o, 2]
        if codes.is_cpu:
            self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        else:
            pairs = codes[:, ::2] << 4 | codes[:, 1::2]
            self.weight = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)

    def forward(self, x: Tensor) -> Tensor:
        """Project bf16 [..., i] to [..., o]."""
        rows = x.reshape(-1, self.in_features).contiguous()  # [n, i]
        ops: Any = torch.ops.aten
        multiply = ops._weight_int4pack_mm_for_cpu if x.is_cpu else ops._weight_int4pack_mm
        out = multiply(rows, self.weight, GROUP, self.scales).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ValueError(
            f"{prefix}weight is in int4 for inference and has no form to save: load the model "
            "with four_bit=off"
        )


def hold_in_int4(model: Qwen25VL) -> Qwen25VL:
    """Have the linear layers of a model's decoder hold int4, but never its output; return it.

    The model is on the meta device: its new layers are empty until they are given their weights.

    Raises:
        ValueError: if a layer is not whole tiles, naming it.
    """
    plain = [path for path, layer in model.layers.named_modules() if type(layer) is Linear]
    for path in plain:
        layer: Any = model.layers.get_submodule(path)
        try:
            held = Int4Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        except ValueError as error:
            raise ValueError(f"layers.{path}: {error}; set four_bit=nf4 or four_bit=off") from error
        model.layers.set_submodule(path, held)
    return model


def multiplies_int4(device: torch.device) -> bool:
    """Ask torch whether it has kernels for int4 on a device, and whether they are right."""
    if device.type not in ("cpu", "cuda"):
        return False
    width = TILE["in_features"]
    weight = torch.arange(16.0, device=device).repeat(width, width // 16)  # a code each
    layer = Int4Linear(width, width, bias=False)
    try:
        layer.fill(weight.bfloat16())
        found = layer(torch.eye(width, dtype=torch.bfloat16, device=device)).T
    except RuntimeError:
        return False
    return torch.equal(found.float(), weight)


def _coded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [o, i], and of each group the scale and zero point, [g, o, 2]."""
    grouped = weight.float().unflatten(1, (-1, GROUP))  # [o, g, GROUP]
    least, most = grouped.aminmax(dim=-1, keepdim=True)
    # of a group of equal weights: any scale will do
    scale = ((most - least) / 15).clamp_min(torch.finfo(weight.dtype).tiny).to(weight.dtype)
    zero_point = (least + 8 * scale.float()).to(weight.dtype)
    codes = (grouped - zero_point.float()).div_(scale.float()).add_(8).round_().clamp_(0, 15)
    scales = torch.cat([scale, zero_point], dim=-1).transpose(0, 1).contiguous()
    return codes.flatten(1).to(torch.uint8), scales
