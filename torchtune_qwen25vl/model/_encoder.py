"""The vision encoder: patches of all images and videos of a batch in, embeddings out.

Shapes: p patches, m merged units (p / spatial_merge_size**2), i images and videos, d_v width of
the encoder, d width of the decoder, n_h heads, h_d head dim.

Nothing is padded. Patches stand in one row after another, window by window; in most layers a
patch sees its window only, in `full_attn_indices` its whole frame. Neither needs a mask: patches
are split into segments.

Source: arXiv 2502.13923, section 2.1.1; models/qwen2_5_vl/modeling_qwen2_5_vl.py in transformers.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer

from torchtune_qwen25vl._position_ids import frame_lengths, patch_positions, window_order
from torchtune_qwen25vl.model._observe import Observe, shown
from torchtune_qwen25vl.model._positional_embeddings import VisionRotaryEmbedding, rotate
from torchtune_qwen25vl.model._products import Linear
from torchtune_qwen25vl.model._segments import Runs, Segments, attend_within, cut, runs_of


class Arrangement(NamedTuple):
    """How units stand inside the encoder, and who sees whom there.

    Attributes:
        order: which unit, counted in reading order, stands where, int64 [m]
        windows: segments of the layers in which a patch sees its window
        frames: segments of the layers in which a patch sees its frame
    """

    order: Tensor
    windows: Runs
    frames: Runs


def arrange(
    grids: list[list[int]], *, spatial_merge_size: int, window_size: int, patch_size: int
) -> Arrangement:
    """Put units window by window, in each frame windows of equal length side by side.

    Attention is one call for each run of equal segments. A frame has at most four lengths of
    windows (inner ones, right edge, bottom edge, corner), which window order would alternate.

    Args:
        grids: t, h, w of each image and video, in patches
        spatial_merge_size: patches of a unit along h and along w
        window_size: pixels along the side of a window
        patch_size: pixels along the side of a patch
    """
    order, lengths = window_order(
        grids,
        spatial_merge_size=spatial_merge_size,
        window_size=window_size,
        patch_size=patch_size,
    )
    frames = frame_lengths(grids)
    windows = order.split([length // spatial_merge_size**2 for length in lengths])
    frame_of = list(_owners(lengths, frames))
    by_length = sorted(range(len(windows)), key=lambda k: (frame_of[k], -lengths[k]))
    return Arrangement(
        torch.cat([windows[k] for k in by_length]),
        runs_of(lengths[k] for k in by_length),
        runs_of(frames),
    )


def _owners(lengths: Sequence[int], wholes: Sequence[int]) -> Iterator[int]:
    """The whole in which each part lies, parts and wholes given by their lengths in order."""
    whole, left = 0, wholes[0]
    for length in lengths:
        if left == 0:
            whole, left = whole + 1, wholes[whole + 1]
        yield whole
        left -= length


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches; the checkpoint's Conv3d with kernel = stride.

    Args:
        patch_dim: values in a patch, channels x frames x height x width
        embed_dim: d_v
    """

    def __init__(self, patch_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = Linear(patch_dim, embed_dim, bias=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed [p, patch_dim] as [p, d_v], in the dtype of the weights, under autocast too."""
        dtype = self.proj.weight.dtype
        return self.proj(pixel_values.to(dtype)).to(dtype)


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

    def forward(self, x: Tensor, *, rotation: Tensor, segments: Segments) -> Tensor:
        """Attend, [p, d_v] -> [p, d_v]; `rotation` is [p, 2, h_d]."""
        attended = attend_within(*self.heads(x, rotation), segments)  # [p, n_h, h_d]
        return self.output_proj(attended.flatten(1))  # [p, d_v]

    def heads(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, both turned, and values, [p, n_h, h_d] each."""
        q, k = (rotate(self._heads(proj(x)), rotation) for proj in (self.q_proj, self.k_proj))
        return q, k, self._heads(self.v_proj(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class VisionLayer(TransformerSelfAttentionLayer):
    """Pre-norm layer; torchtune's, so that its checkpointing and sharding policies find it."""

    def forward(self, x: Tensor, *, rotation: Tensor, segments: Segments) -> Tensor:
        """Transform [p, d_v]; `rotation` is [p, 2, h_d]."""
        x = x + self.attn(self.sa_norm(x), rotation=rotation, segments=segments)
        return x + self.mlp(self.mlp_norm(x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what knows no segments, for any number of patches.

        Attention is not compiled: it would be anew for the segments of every batch.
        """
        self.attn.heads = torch.compile(self.attn.heads, *args, dynamic=True, **kwargs)
        self.mlp.compile(*args, dynamic=True, **kwargs)


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

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, *, observe: Observe | None = None
    ) -> Tensor:
        """Encode images and videos.

        Args:
            pixel_values: [p, patch_dim], each image's patches in block order, one after the other
            grid_thw: frames, rows and columns of patches, int [i, 3]; best on the CPU
            observe: is shown "vision" and "merger"

        Returns:
            [m, d], one embedding per placeholder, in reading order

        Raises:
            ValueError: if the grids do not describe the patches.
        """
        grids = grid_thw.tolist()  # the host waits where they are not on the CPU
        self._check(grids, pixel_values)
        order, windows, frames = self.arrange(grids)
        positions = self._by_unit(patch_positions(grids, self.spatial_merge_size))[order]
        to_device = partial(Tensor.to, device=pixel_values.device, non_blocking=True)
        inverse_order, order, positions = map(to_device, (order.argsort(), order, positions))

        rotation = self.rotary(positions.flatten(0, 1))
        x = self._by_unit(pixel_values)[order].flatten(0, 1)  # [p, patch_dim], window by window
        x = self.patch_embed(x)  # [p, d_v]
        in_windows, in_frames = cut(windows, x), cut(frames, x)
        for index, layer in enumerate(self.layers):
            segments = in_frames if index in self.full_attn_indices else in_windows
            x = layer(x, rotation=rotation, segments=segments)
            if observe is not None:
                observe("vision", x, index=index)
        return shown(observe, "merger", self.merger(x).index_select(0, inverse_order))  # [m, d]

    def arrange(self, grids: list[list[int]]) -> Arrangement:
        """Return how the units of these images and videos stand while the layers run."""
        return arrange(
            grids,
            spatial_merge_size=self.spatial_merge_size,
            window_size=self.window_size,
            patch_size=self.patch_size,
        )

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
