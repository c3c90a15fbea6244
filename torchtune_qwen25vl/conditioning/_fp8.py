"""Linear layers whose weights stay in fp8."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_qwen25vl.conditioning._weights import Scaled


class ScaledLinear(nn.Module):
    """A linear layer that holds fp8 and computes in the dtype of its input.

    The product of weight and scale is fp32 and rounded once, so that outputs are those of weights
    that were dequantised when they were read.

    Args:
        linear: the layer that it stands for, on the meta device
        weight: its weight, fp8 [out, in]
        scale: fp32, one number or one for each row
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Transform [..., in] to [..., out]."""
        return F.linear(x, Scaled(self.weight, self.scale).plain(x.dtype), self.bias)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move the layer, but let no change of dtype reach what is quantised."""
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        self.weight = weight.to(self.weight.device)
        self.scale = scale.to(self.scale.device)
        return self


def hold_fp8(model: nn.Module, name: str, value: Scaled, device: torch.device | str) -> bool:
    """Let the linear layer that has a weight of this name hold it in fp8, if it is one that can.

    The patch embedding cannot: the encoder takes patches in the dtype of its weight.
    """
    path = name.removesuffix(".weight")
    linear = model.get_submodule(path) if name.endswith(".weight") else None
    if not isinstance(linear, nn.Linear) or "patch_embed" in path:
        return False
    weight, scale = (tensor.to(device, copy=True) for tensor in (value.weight, value.scale))
    model.set_submodule(path, ScaledLinear(linear, weight, scale))
    return True
