"""Faults of the vision encoder."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.faults._fault import (
    Arguments,
    Fault,
    change,
    edited,
    exchange,
    on_entry,
    on_exit,
    replaced,
)
from torchtune_qwen25vl._position_ids import frame_lengths, patch_positions, window_order


def rms_norms(part: nn.Module) -> list[nn.Module]:
    """The norms of a part of a model."""
    return [module for module in part.modules() if type(module).__name__ == "RMSNorm"]


def _flip_positions(right: Callable) -> Callable:
    return lambda *args: right(*args).flip(-1)


def _raster_positions(right: Callable) -> Callable:
    def wrong(grid_thw: list, merge: int) -> Tensor:
        return torch.cat([right([(t, h, w)], 1) for t, h, w in grid_thw])

    return wrong


def _join_frames(right: Callable) -> Callable:
    return lambda grid_thw: [t * h * w for t, h, w in grid_thw]


def _leave_windows(model: Any) -> None:
    sizes = {
        name: getattr(model.vision, name)
        for name in ("spatial_merge_size", "window_size", "patch_size")
    }

    def leave(arguments: Arguments, output: Tensor) -> Tensor:
        order, _ = window_order(arguments["grid_thw"].tolist(), **sizes)
        return output[order]

    on_exit(model.vision, leave)


def _drop_second_frame(model: Any) -> None:
    def drop(arguments: Arguments) -> Arguments:
        values = arguments["pixel_values"]
        frames = values.unflatten(-1, (3, 2, -1)).clone()  # [p, channel, frame, pixel]
        frames[:, :, 1] = 0
        return {"pixel_values": frames.flatten(1)}

    on_entry(model.vision, drop)


def _reverse_merge_order(model: Any) -> None:
    unit = model.vision.spatial_merge_size**2

    def reverse(arguments: Arguments) -> Arguments:
        (name, patches), *_ = arguments.items()  # [p, d_v]
        return {name: patches.unflatten(0, (-1, unit)).flip(1).flatten(0, 1)}

    on_entry(model.vision.merger, reverse)


def _tanh_gelu(model: Any) -> None:
    merger, unit = model.vision.merger, model.vision.spatial_merge_size**2

    def merge(arguments: Arguments, output: Tensor) -> Tensor:
        (patches,) = arguments.values()  # [p, d_v]
        units = merger.norm(patches).unflatten(0, (-1, unit)).flatten(1)
        return merger.w2(F.gelu(merger.w1(units), approximate="tanh"))

    on_exit(merger, merge)


def _reverse_embeddings(model: Any) -> None:
    on_exit(model.vision, lambda arguments, output: output.flip(0))


def _cut_gradient(model: Any) -> None:
    on_exit(model.vision, lambda arguments, output: output.detach())


def _eps(model: Any) -> None:
    for norm in rms_norms(model.vision.layers):
        change(norm, eps=1e-5)


def _merger_eps(model: Any) -> None:
    change(model.vision.merger.norm, eps=1e-5)


def _exchange_q_and_k(model: Any) -> None:
    for layer in model.vision.layers:
        exchange(layer.attn, "q_proj", "k_proj")


def _full_one_early(model: Any) -> None:
    early = frozenset(k - 1 for k in model.vision.full_attn_indices)
    change(model.vision, full_attn_indices=early)


def _full_everywhere(model: Any) -> None:
    change(model.vision, full_attn_indices=frozenset(range(len(model.vision.layers))))


def _small_windows(model: Any) -> None:
    change(model.vision, window_size=model.vision.window_size // 2)


FAULTS: dict[str, Fault] = {
    "vision rows and columns swapped": replaced(patch_positions, _flip_positions, "vision layers"),
    "vision positions in raster order": replaced(
        patch_positions, _raster_positions, "vision layers"
    ),
    "window size halved in the encoder": edited(_small_windows, "vision layers"),
    "full attention one layer early": edited(_full_one_early, "vision layers"),
    "full attention in every layer": edited(_full_everywhere, "vision layers"),
    "attention across frames": replaced(frame_lengths, _join_frames, "vision layers"),
    "second frame of a patch missing": edited(_drop_second_frame, "vision layers"),
    "vision eps 1e-5": edited(_eps, "vision layers"),
    "vision q and k exchanged": edited(_exchange_q_and_k, "vision layers"),
    "windows not undone": edited(_leave_windows, "encoder"),
    "merge order reversed": edited(_reverse_merge_order, "encoder"),
    "tanh GELU": edited(_tanh_gelu, "encoder"),
    "embeddings in the wrong places": edited(_reverse_embeddings, "encoder"),
    "merger eps 1e-5": edited(_merger_eps, "encoder"),
    "gradient of the encoder cut": edited(_cut_gradient, "gradients"),
}
