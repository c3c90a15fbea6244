"""Which frames of a video a row keeps, and at what rate they then pass."""

import math
from collections.abc import Mapping
from typing import Any

from torchtune_qwen25vl.transform import sample_frames

SAMPLING = ("num_frames", "fps", "min_frames", "max_frames")
"""What a row may say about it."""


def kept_frames(total_frames: int, fps: float, sampling: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the frames that the transform would keep.

    Args:
        total_frames: frames of the video
        fps: frames in each second of it
        sampling: arguments of `sample_frames`, as in `Qwen25VLVideoTransform.sampling`

    Raises:
        ValueError: if it cannot be sampled so, or more than `max_frames` frames would be kept.
    """
    kept = sample_frames(total_frames, source_fps=fps, **sampling).tolist()
    if len(kept) > sampling["max_frames"]:
        raise ValueError(
            f"{len(kept)} frames would be kept, more than max_frames={sampling['max_frames']}; set "
            "video.fps of the tokenizer"
        )
    return kept


def resampled_rate(num_frames: int, fps: float, sampling: Mapping[str, Any]) -> float:
    """Return a rate, `fps` but for rounding, at which the transform keeps all frames it is given.

    Args:
        num_frames: frames that were kept
        fps: frames in each second, of those kept
        sampling: arguments of `sample_frames`, as in `Qwen25VLVideoTransform.sampling`

    Raises:
        ValueError: if the transform's own sampling would drop some of them.
    """
    for _ in range(4):
        if len(sample_frames(num_frames, source_fps=fps, **sampling)) == num_frames:
            return fps
        fps = math.nextafter(fps, 0)
    raise ValueError(
        f"{num_frames} frames were sampled as the row asks, but the tokenizer would sample them "
        "again; leave its video.fps and video.num_frames unset, or the row's"
    )
