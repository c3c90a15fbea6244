"""The vision encoder: patches of all images and videos of a batch in, embeddings out.

Shapes: p patches, m merged units (p / spatial_merge_size**2), i images and videos, d_v width of
the encoder, d width of the decoder, n_h heads, h_d head dim.

Nothing is padded. Patches stand in one row after another, window by window; in most layers a
patch sees its window only, in `full_attn_indices` its whole frame. Neither needs a mask: patches
are split into segments.

Source: arXiv 2502.13923, section 2.1.1; models/qwen2_5_vl/modeling_qwen2_5_vl.py in transformers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer

from torchtune_qwen25vl._position_ids import frame_lengths, patch_positions, window_order
from torchtune_qwen25vl.model._positional_embeddings import VisionRotaryEmbedding, rotate

MOVED = 1 << 14  # values of q, k and v each that a CPU moves in the time of one call of attention


@dataclass(frozen=True)
class Segments:
    """Who sees whom: patches of one segment see each other and nobody else.

    Attributes:
        runs: segments of equal length that follow each other, as (how many, patches in each)
        rotation: where the patches are, [p, 2, h_d], in the order of the input
        order: which patch stands where in the runs, [p]; None if they stand as the input does
        inverse_order: where in the runs each patch went, [p]
    """

    runs: list[tuple[int, int]]
    rotation: Tensor
    order: Tensor | None = None
    inverse_order: Tensor | None = None


def make_segments(lengths: Sequence[int], rotation: Tensor, *, embed_dim: int) -> Segments:
    """Split p patches into segments of these lengths.

    Attention is one call for each run. Segments of equal length that do not follow each other are
    brought together where the calls that this saves cost more than moving patches there and back:
    on a GPU always, on a CPU where pictures or heads are small. The result is the same, bit for
    bit.

    Args:
        lengths: patches in each segment, in order; they add up to p
        rotation: [p, 2, h_d]
        embed_dim: d_v
    """
    saved = len(_runs(lengths)) - len(set(lengths))
    is_dear = rotation.device.type == "cpu" and sum(lengths) * embed_dim > MOVED * saved
    if not saved or is_dear:
        return Segments(_runs(lengths), rotation)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    pieces = torch.arange(sum(lengths)).split(list(lengths))
    order = torch.cat([pieces[k] for k in by_length])
    inverse_order = order.argsort().to(rotation.device)
    order = order.to(rotation.device)
    return Segments(_runs(sorted(lengths)), rotation, order, inverse_order)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return [(len(list(run)), length) for length, run in itertools.groupby(lengths)]


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches; the checkpoint's Conv3d with kernel = stride.

    Args:
        patch_dim: values in a patch, channels x frames x height x width
        embed_dim: d_v
    """

    def __init__(self, patch_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_dim, embed_dim, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed [p, patch_dim] as [p, d_v], in the dtype of the weights."""
        return self.proj(pixel_values.to(self.proj.weight.dtype))


class VisionAttention(nn.Module):
    """Bidirectional attention within segments.

    Not a `MultiHeadAttention`: torchtune's tensor-parallel set-up rewrites those.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj

    def forward(self, x: Tensor, *, segments: Segments) -> Tensor:
        """Attend, [p, d_v] -> [p, d_v]."""
        q = rotate(self._heads(self.q_proj(x)), segments.rotation)  # [p, n_h, h_d]
        k = rotate(self._heads(self.k_proj(x)), segments.rotation)
        v = self._heads(self.v_proj(x))
        return self.output_proj(_attend(q, k, v, segments))  # [p, d_v]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


def _attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention of [p, n_h, h_d] within the segments of each run, [p, n_h * h_d]."""
    if segments.order is not None:
        q, k, v = (x.index_select(0, segments.order) for x in (q, k, v))
    sizes = [count * length for count, length in segments.runs]
    pieces = zip(segments.runs, *(x.split(sizes) for x in (q, k, v)), strict=True)
    outputs = []
    for run, *qkv in pieces:
        batched = [x.unflatten(0, run).transpose(1, 2) for x in qkv]  # [count, n_h, length, h_d]
        attended = F.scaled_dot_product_attention(*batched)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))  # [count * length, n_h, h_d]
    x = torch.cat(outputs).flatten(1)
    return x if segments.inverse_order is None else x.index_select(0, segments.inverse_order)


class VisionLayer(TransformerSelfAttentionLayer):
    """Pre-norm layer; torchtune's, so that its checkpointing and sharding policies find it."""

    def forward(self, x: Tensor, *, segments: Segments) -> Tensor:
        """Transform [p, d_v]."""
        x = x + self.attn(self.sa_norm(x), segments=segments)
        return x + self.mlp(self.mlp_norm(x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: compiled code would be specialised to the segments of every new batch."""


class PatchMerger(nn.Module):
    """Two-layer MLP from the patches of a unit, side by side, to one embedding.

    Args:
        norm: applied to each patch
        w1: linear, spatial_merge_size**2 * d_v -> the same
        w2: linear, spatial_merge_size**2 * d_v -> d
        spatial_merge_size: patches of a unit along h and along w
    """

    def __init__(
        self, *, norm: nn.Module, w1: nn.Module, w2: nn.Module, spatial_merge_size: int
    ) -> None:
        super().__init__()
        self.norm = norm
        self.w1 = w1
        self.w2 = w2
        self.spatial_merge_size = spatial_merge_size

    def forward(self, x: Tensor) -> Tensor:
        """Merge [p, d_v] to [m, d]."""
        x = self.norm(x).unflatten(0, (-1, self.spatial_merge_size**2)).flatten(1)  # [m, 4 * d_v]
        return self.w2(F.gelu(self.w1(x)))


class VisionEncoder(nn.Module):
    """Vision transformer with window attention, as in Qwen2.5-VL.

    Args:
        patch_embed: patches to width d_v
        layers: `VisionLayer`s
        merger: units to width d
        rotary: rotation of every patch by its row and column
        patch_size: pixels along the side of a patch
        spatial_merge_size: patches of a unit along h and along w
        window_size: pixels along the side of a window
        full_attn_indices: layers in which a patch sees its whole frame
    """

    def __init__(
        self,
        *,
        patch_embed: PatchEmbed,
        layers: Sequence[VisionLayer],
        merger: PatchMerger,
        rotary: VisionRotaryEmbedding,
        patch_size: int,
        spatial_merge_size: int,
        window_size: int,
        full_attn_indices: Sequence[int],
    ) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.layers = nn.ModuleList(layers)
        self.merger = merger
        self.rotary = rotary
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.window_size = window_size
        self.full_attn_indices = frozenset(full_attn_indices)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """Encode images and videos.

        Args:
            pixel_values: [p, patch_dim], each image's patches in block order, one after the other
            grid_thw: frames, rows and columns of patches, int [i, 3]

        Returns:
            [m, d], one embedding per placeholder, in reading order

        Raises:
            ValueError: if the grids do not describe the patches.
        """
        grids = grid_thw.tolist()  # the only host sync
        self._check(grids, pixel_values)
        order, window_lengths = window_order(
            grids,
            spatial_merge_size=self.spatial_merge_size,
            window_size=self.window_size,
            patch_size=self.patch_size,
        )
        positions = self._by_unit(patch_positions(grids, self.spatial_merge_size))[order]
        inverse_order = order.argsort().to(pixel_values.device)
        order = order.to(pixel_values.device)

        rotation = self.rotary(positions.flatten(0, 1).to(pixel_values.device))
        x = self._by_unit(pixel_values)[order].flatten(0, 1)  # [p, patch_dim], window by window
        x = self.patch_embed(x)  # [p, d_v]
        windows, frames = (
            make_segments(lengths, rotation, embed_dim=x.shape[1])
            for lengths in (window_lengths, frame_lengths(grids))
        )
        for index, layer in enumerate(self.layers):
            x = layer(x, segments=frames if index in self.full_attn_indices else windows)
        return self.merger(x).index_select(0, inverse_order)  # [m, d]

    def _by_unit(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.spatial_merge_size**2))  # [m, 4, ...]

    def _check(self, grids: list[list[int]], pixel_values: Tensor) -> None:
        merge = self.spatial_merge_size
        if any(h % merge or w % merge for _, h, w in grids):
            raise ValueError(
                f"rows and columns of patches must be multiples of {merge}, got {grids}; "
                "smart_resize gives such sizes"
            )
        expected = sum(t * h * w for t, h, w in grids)
        if expected != len(pixel_values):
            raise ValueError(
                f"grid_thw {grids} describes {expected} patches but pixel_values holds "
                f"{len(pixel_values)}; were they concatenated in the same order?"
            )
