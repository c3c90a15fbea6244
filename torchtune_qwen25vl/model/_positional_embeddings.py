"""Rotary embeddings: positions of patches (2 axes) and of tokens (3 axes) turned into rotations.

Shapes: b batch, s sequence, p patches, n_h heads, h_d head dim. A *rotation* [..., 2, h_d]
holds the cosines and the signed sines of the angles; coordinate k of a head turns with
k + h_d / 2.
Angles are fp32 and the turning happens in fp32, whatever the dtype of what is turned.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from torchtune_qwen25vl.model._fused import fused


@fused
def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn all heads of x [..., n_h, h_d] alike, by a rotation [..., 2, h_d]."""
    cos, sin = rotation.unsqueeze(-3).unbind(-2)  # [..., 1, h_d]
    x32 = x.float()
    return (x32 * cos + x32.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def _rotation(angles: Tensor) -> Tensor:
    """Of angles [..., h_d / 2]: both halves of a head have the same ones, turned opposite ways."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=-2)


class _InverseFrequencies(nn.Module):
    """Holds base ** -(2k / dim), k < dim / 2, in fp32 through every cast and move of the module."""

    inv_freq: Tensor

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        self.dim = dim
        self.base = base
        self.rope_init()

    def rope_init(self) -> None:
        """Compute the frequencies on the default device.

        torchtune's distributed recipes build on the meta device and then call this. The arithmetic
        stays on the CPU, where Hugging Face does it too: an ulp here is a wrong angle at 1e5.
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        inv_freq = (1.0 / self.base**exponents).to(torch.get_default_device())
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_InverseFrequencies":
        super()._apply(fn, recurse)
        with self.inv_freq.device:
            self.rope_init()  # fn may have rounded to bf16 or handed out empty memory
        return self


class VisionRotaryEmbedding(_InverseFrequencies):
    """2-D rotation of the vision encoder: the first half of the angles by row, the rest by column.

    Args:
        head_dim: h_d, a multiple of 4
        base: longest period is 2 pi * base

    Source: `Qwen2_5_VLVisionRotaryEmbedding`, models/qwen2_5_vl/modeling_qwen2_5_vl.py.
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__(head_dim // 2, base)

    def forward(self, positions: Tensor) -> Tensor:
        """Turn rows and columns, int [p, 2], into a rotation, fp32 [p, 2, h_d]."""
        angles = positions.unsqueeze(-1) * self.inv_freq  # [p, 2, h_d / 4]
        return _rotation(angles.flatten(1))


class MultimodalRotaryEmbedding(_InverseFrequencies):
    """M-RoPE: each frequency follows one of the axes t, h, w; text has the same position on all.

    Args:
        head_dim: h_d
        base: `rope_theta` of the checkpoint's config
        mrope_section: frequencies in each successive section, [16, 24, 24]; they follow t, h, w

    Raises:
        ValueError: if the sections do not add up to h_d / 2.

    Source: arXiv 2409.12191, section 2.1; `Qwen2_5_VLRotaryEmbedding` in transformers.
    """

    def __init__(self, head_dim: int, base: float, mrope_section: Sequence[int]) -> None:
        if sum(mrope_section) != head_dim // 2:
            raise ValueError(
                f"mrope_section must add up to half the head dim, got {list(mrope_section)} for "
                f"head dim {head_dim}; take both from the same config"
            )
        super().__init__(head_dim, base)
        self.mrope_section = list(mrope_section)

    def forward(self, input_pos: Tensor | None, tokens_shape: Sequence[int]) -> Tensor:
        """Return the rotation of every token, fp32 [b or 1, s, 2, h_d].

        Args:
            input_pos: [b, s, 3]; for text also [b, s], [s], [b] when s is 1, or None for 0..s-1
            tokens_shape: b and s

        Raises:
            ValueError: if the positions fit no such shape.
        """
        positions = self._three_axes(input_pos, *tokens_shape)
        sections = self.inv_freq.split(self.mrope_section)
        angles = [positions[..., k % 3, None] * freqs for k, freqs in enumerate(sections)]
        return _rotation(torch.cat(angles, dim=-1))

    def _three_axes(self, input_pos: Tensor | None, b: int, s: int) -> Tensor:
        if input_pos is None:
            input_pos = torch.arange(s, device=self.inv_freq.device)
        shape = tuple(input_pos.shape)
        if shape in ((b, s, 3), (1, s, 3)):
            return input_pos
        if shape in ((b, s), (1, s), (s,)) or (s == 1 and shape == (b,)):
            return input_pos.view(-1, s, 1).expand(-1, -1, 3)
        raise ValueError(
            f"input_pos must be [b, s, 3], or [b, s], [s] or (one token) [b] for text, got "
            f"{list(shape)} for tokens [{b}, {s}]; see mrope_position_ids"
        )
