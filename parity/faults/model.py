"""Faults of the encoder and the decoder: each is one that some port has had, or nearly."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.faults._fault import Fault, edited, patched, swap
from torchtune_qwen25vl.model import _encoder
from torchtune_qwen25vl.model._encoder import PatchEmbed, PatchMerger, VisionEncoder
from torchtune_qwen25vl.model._positional_embeddings import MultimodalRotaryEmbedding, _rotation
from torchtune_qwen25vl.training import _step


def _flip_positions(right: Callable) -> Callable:
    return lambda *args: right(*args).flip(-1)


def _raster_positions(right: Callable) -> Callable:
    def wrong(grid_thw: list, merge: int) -> Tensor:
        return torch.cat([right([(t, h, w)], 1) for t, h, w in grid_thw])

    return wrong


def _leave_windows(right: Callable) -> Callable:
    def wrong(self: VisionEncoder, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        order, _ = _encoder.window_order(
            grid_thw.tolist(),
            spatial_merge_size=self.spatial_merge_size,
            window_size=self.window_size,
            patch_size=self.patch_size,
        )
        return right(self, pixel_values, grid_thw)[order]

    return wrong


def _join_frames(right: Callable) -> Callable:
    return lambda grid_thw: [t * h * w for t, h, w in grid_thw]


def _last_frame_missing(right: Callable) -> Callable:
    def wrong(self: PatchEmbed, pixel_values: Tensor) -> Tensor:
        frames = pixel_values.unflatten(-1, (3, 2, -1)).clone()  # [p, channel, frame, pixel]
        frames[:, :, 1] = 0
        return right(self, frames.flatten(1))

    return wrong


def _merge_reversed(right: Callable) -> Callable:
    def wrong(self: PatchMerger, x: Tensor) -> Tensor:
        unit = self.spatial_merge_size**2
        return right(self, x.unflatten(0, (-1, unit)).flip(1).flatten(0, 1))

    return wrong


def _tanh_gelu(right: Callable) -> Callable:
    def wrong(self: PatchMerger, x: Tensor) -> Tensor:
        x = self.norm(x).unflatten(0, (-1, self.spatial_merge_size**2)).flatten(1)
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))

    return wrong


def _reverse_embeddings(right: Callable) -> Callable:
    return lambda *args, **kwargs: right(*args, **kwargs).flip(0)


def _cut_gradient(right: Callable) -> Callable:
    return lambda *args, **kwargs: right(*args, **kwargs).detach()


def _one_axis(right: Callable) -> Callable:
    def wrong(self: Any, input_pos: Any, tokens_shape: Any) -> Tensor:
        return right(self, None, tokens_shape)

    return wrong


def _interleaved_axes(right: Callable) -> Callable:
    def wrong(self: Any, input_pos: Any, tokens_shape: Any) -> Tensor:
        positions = self._three_axes(input_pos, *tokens_shape)
        axis = torch.arange(len(self.inv_freq)) % 3
        return _rotation(positions[..., axis] * self.inv_freq)

    return wrong


def _bf16_tables(right: Callable) -> Callable:
    return lambda *args: right(*args).bfloat16().float()


def _shift_again(right: Callable) -> Callable:
    return lambda hidden, weight, labels, **kwargs: right(
        hidden[..., :-1, :], weight, labels[..., 1:], **kwargs
    )


def _rename(module: nn.Module, **values: Any) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _rms_norms(part: nn.Module) -> list[nn.Module]:
    return [module for module in part.modules() if type(module).__name__ == "RMSNorm"]


def _text_eps(model: Any) -> None:
    for part in (model.layers, model.norm):
        for norm in _rms_norms(part):
            _rename(norm, eps=1e-5)


def _vision_eps(model: Any) -> None:
    for norm in _rms_norms(model.vision.layers):
        _rename(norm, eps=1e-5)


def _drop_k_bias(model: Any) -> None:
    for layer in model.layers:
        layer.attn.k_proj.bias = None


def _full_one_early(model: Any) -> None:
    model.vision.full_attn_indices = frozenset(k - 1 for k in model.vision.full_attn_indices)


def _full_everywhere(model: Any) -> None:
    model.vision.full_attn_indices = frozenset(range(len(model.vision.layers)))


def _small_windows(model: Any) -> None:
    model.vision.window_size //= 2


def _permute_sections(model: Any) -> None:
    rope = model.pos_embeddings
    rope.mrope_section = rope.mrope_section[1:] + rope.mrope_section[:1]


def _rope_base(model: Any) -> None:
    model.pos_embeddings.base = 10_000.0
    model.pos_embeddings.rope_init()


def _untie(model: Any) -> None:
    weight = model.tok_embeddings.weight
    model.output = nn.Linear(weight.shape[1], weight.shape[0], bias=False)


def _not_causal(model: Any) -> None:
    for layer in model.layers:
        layer.attn.is_causal = False


def _query_heads_interleaved(model: Any) -> None:
    for layer in model.layers:
        attn = layer.attn
        q, heads = attn.q_proj.weight, attn.num_heads
        shuffled = q.unflatten(0, (heads, -1)).roll(1, 0).flatten(0, 1)
        attn.q_proj.weight = nn.Parameter(shuffled)


FAULTS: dict[str, Fault] = {
    "vision rows and columns swapped": patched(
        _encoder, "patch_positions", _flip_positions, "vision layers"
    ),
    "vision positions in raster order": patched(
        _encoder, "patch_positions", _raster_positions, "vision layers"
    ),
    "window size halved in the encoder": edited(_small_windows, "vision layers"),
    "full attention one layer early": edited(_full_one_early, "vision layers"),
    "full attention in every layer": edited(_full_everywhere, "vision layers"),
    "attention across frames": patched(_encoder, "frame_lengths", _join_frames, "vision layers"),
    "second frame of a patch missing": patched(
        PatchEmbed, "forward", _last_frame_missing, "vision layers"
    ),
    "vision eps 1e-5": edited(_vision_eps, "vision layers"),
    "vision q and k exchanged": edited(
        swap("q_proj", "k_proj", lambda m: [layer.attn for layer in m.vision.layers]),
        "vision layers",
    ),
    "windows not undone": patched(VisionEncoder, "forward", _leave_windows, "encoder"),
    "merge order reversed": patched(PatchMerger, "forward", _merge_reversed, "encoder"),
    "tanh GELU": patched(PatchMerger, "forward", _tanh_gelu, "encoder"),
    "embeddings in the wrong places": patched(
        VisionEncoder, "forward", _reverse_embeddings, "encoder"
    ),
    "one-axis positions": patched(
        MultimodalRotaryEmbedding, "forward", _one_axis, "decoder layers"
    ),
    "M-RoPE axes interleaved": patched(
        MultimodalRotaryEmbedding, "forward", _interleaved_axes, "decoder layers"
    ),
    "mrope_section permuted": edited(_permute_sections, "decoder layers"),
    "rope_base 10,000": edited(_rope_base, "decoder layers"),
    "bf16 rotary tables": patched(
        MultimodalRotaryEmbedding, "forward", _bf16_tables, "decoder layers"
    ),
    "text eps 1e-5": edited(_text_eps, "logits"),
    "k bias dropped": edited(_drop_k_bias, "decoder layers"),
    "query heads out of their groups": edited(_query_heads_interleaved, "decoder layers"),
    "gate and up exchanged": edited(
        swap("w1", "w3", lambda m: [layer.mlp for layer in m.layers]), "decoder layers"
    ),
    "attention not causal": edited(_not_causal, "decoder layers"),
    "untied head": edited(_untie, "logits"),
    "gradient of the encoder cut": patched(VisionEncoder, "forward", _cut_gradient, "gradients"),
    "labels shifted twice": patched(_step, "linear_cross_entropy", _shift_again, "loss"),
}
