"""Integers: M-RoPE positions and the window order of the vision encoder."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parity import reference
from parity.inputs import LAYOUTS, Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage, max_error
from torchtune_qwen25vl import mrope_position_ids
from torchtune_qwen25vl._position_ids import patch_positions, window_order

GRIDS: dict[str, list[tuple[int, int, int]]] = {
    "10 x 14": [(1, 10, 14)],
    "whole windows only": [(1, 16, 24)],
    "one unit": [(1, 2, 2)],
    "strip": [(1, 2, 60)],
    "1 MP photo": [(1, 70, 70)],
    "three sizes": [(1, 18, 6), (1, 8, 8), (1, 2, 38)],
    "video": [(3, 10, 6)],
    "image and video": [(1, 20, 14), (2, 6, 18)],
}


def measure_positions(setting: Setting) -> Iterator[Measurement]:
    """Every layout; where this transformers leaves Qwen's rule, `parity.deviations` says how."""
    model = reference.random_model("tiny")
    for name, layout in (LAYOUTS | SHORT_VIDEOS).items():
        inputs = make_inputs(layout, reference.IDS)
        theirs = reference.positions(model, inputs)
        kept = inputs.attention_mask.bool()
        yield Measurement(name, max_error(our_positions(inputs)[kept], theirs[kept]))


def our_positions(inputs: Inputs) -> Tensor:
    """Positions of a batch by Qwen's rule, [b, s, 3]."""
    is_video = torch.tensor(inputs.is_video)
    return mrope_position_ids(
        inputs.tokens,
        inputs.grid_thw[~is_video],
        inputs.grid_thw[is_video],
        inputs.seconds,
        attention_mask=inputs.attention_mask,
        image_token_id=reference.IDS["image_token_id"],
        video_token_id=reference.IDS["video_token_id"],
    )


# The grid reaches further on h or w than on t, where 4.57 and 5.18 and later follow the rule. With
# 30 frame groups fp32 and fp64 differ at these rates; thirds of a second are not to be rounded.
SHORT_VIDEOS: dict[str, list[list[int | tuple]]] = {
    "short video": [[4, (3, 6, 14, 1.0), 9]],
    "two short videos": [[4, (2, 8, 6, 1.0), 3, (3, 10, 12, 1.0), 9]],
    "3 fps": [[4, (12, 6, 40, 2 / 3), 9]],
    **{f"{fps} fps": [[4, (30, 6, 40, 2 / fps), 9]] for fps in (12.5, 25, 29, 50)},
}


def measure_window_order(setting: Setting) -> Iterator[Measurement]:
    """The order of the units and the boundaries of the windows, on grids of every kind."""
    for name, grid_thw in GRIDS.items():
        order, lengths = window_order(
            grid_thw, spatial_merge_size=2, window_size=112, patch_size=14
        )
        their_order, their_lengths = reference.window_order(grid_thw)
        patches = patch_positions(grid_thw, 2)
        yield Measurement(
            name,
            max(
                max_error(order, their_order),
                max_error(lengths, their_lengths),
                max_error(patches, reference.patch_positions(grid_thw)),
            ),
        )


POSITIONS = Stage(
    name="positions",
    what="M-RoPE positions, three axes; theirs, or theirs but for a named deviation",
    tolerance="0: integers",
    fault="text after media resumes one late",
    measure=measure_positions,
)
WINDOW_ORDER = Stage(
    name="window order",
    what="order and lengths of the encoder's windows, rows and columns of its patches",
    tolerance="0: integers",
    fault="windows read by columns",
    measure=measure_window_order,
)
