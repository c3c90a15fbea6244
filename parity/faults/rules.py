"""Rules that versions of transformers have in place of Qwen's: here those of positions.

They are no faults of ours that a stage must see: `parity.deviations` names the versions that follow
them, and a version passes if it gives exactly these positions. `masked` has those of attention.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from parity.faults import masked
from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl import mrope_position_ids

MERGE, TOKENS_PER_SECOND = 2, 2


def _rule(*, whole_seconds: bool, behind_grid: bool, time_of_start: bool = False) -> Fault:
    """A rule of positions.

    Args:
        whole_seconds: the seconds between frame groups lose their fraction
        behind_grid: text resumes behind the rows and columns of a video, whatever its time
        time_of_start: all units have one time, that of the start, scaled as if it were a frame, and
            rows go on from frame to frame
    """

    def wrap(right: Callable) -> Callable:
        def wrong(
            tokens: Tensor,
            images: Tensor | None = None,
            videos: Tensor | None = None,
            seconds: Any = (),
            *,
            attention_mask: Tensor | None = None,
            image_token_id: int,
            video_token_id: int,
        ) -> Tensor:
            given = {image_token_id: images, video_token_id: videos}
            grids = {k: iter([] if one is None else one.tolist()) for k, one in given.items()}
            kept_ones = torch.ones_like(tokens) if attention_mask is None else attention_mask
            rates = iter(torch.tensor(seconds).tolist())
            positions = tokens.new_zeros(*tokens.shape, 3)
            for row, kept, filled in zip(tokens, kept_ones.bool(), positions, strict=True):
                start, pieces = 0, []
                for token, run in groupby(row[kept].tolist(), lambda t: t if t in grids else None):
                    if token is None:
                        piece = torch.arange(len(list(run))).view(-1, 1).expand(-1, 3) + start
                        end = start + len(piece)
                    else:
                        rate = 1.0 if token == image_token_id else next(rates)
                        interval = TOKENS_PER_SECOND * (int(rate) if whole_seconds else rate)
                        t, *sides = next(grids[token])
                        h, w = (side // MERGE for side in sides)
                        times = (torch.arange(t) * interval).long()
                        axes = times, torch.arange(h), torch.arange(w)
                        piece = torch.cartesian_prod(*axes) + start  # [t * h * w, 3]
                        if time_of_start:
                            piece[:, 0] = int(start * interval)
                            piece[:, 1] = torch.arange(h).repeat_interleave(t * w) + start
                        end = start + max(h, w) if behind_grid else int(piece.max()) + 1
                    pieces.append(piece)
                    start = end
                filled[kept] = torch.cat(pieces)
            return positions

        return wrong

    return replaced(mrope_position_ids, wrap, "positions")


RULES: dict[str, Fault] = {
    **masked.RULES,
    "seconds of videos cut to whole ones": _rule(whole_seconds=True, behind_grid=False),
    "text resumes behind the grid": _rule(whole_seconds=False, behind_grid=True),
    "whole seconds, text behind the grid": _rule(whole_seconds=True, behind_grid=True),
    "all units at the time of the start": _rule(
        whole_seconds=True, behind_grid=True, time_of_start=True
    ),
}
