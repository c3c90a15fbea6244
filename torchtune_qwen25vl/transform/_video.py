"""Video frames to patches, bit for bit as transformers' Qwen2VLVideoProcessor makes them.

Shapes: t temporal_patch_size, c channels, s patch_size, h w height and width in pixels,
p = g_t * g_h * g_w patches, where g_t counts groups of t frames.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchtune.utils import get_logger

from torchtune_qwen25vl.transform._geometry import (
    PATCH_SIZE,
    SPATIAL_MERGE_SIZE,
    TEMPORAL_PATCH_SIZE,
)
from torchtune_qwen25vl.transform._image import smart_resize
from torchtune_qwen25vl.transform._patches import IMAGE_MEAN, IMAGE_STD, Patchify
from torchtune_qwen25vl.transform._pixels import as_pixels, resized_rgbx, size

DEFAULT_FPS = {"hf": 24.0, "qwen_vl_utils": 2.0}
"""Rate that each way of sampling takes the kept frames to have where the video's is unknown."""


def sample_frames(
    total_frames: int,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    source_fps: float | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
    temporal_patch_size: int = TEMPORAL_PATCH_SIZE,
    sampling: Literal["hf", "qwen_vl_utils"] = "hf",
) -> Tensor:
    """Return the numbers of the frames to keep: int64, a multiple of `temporal_patch_size` of them.

    Their number is `num_frames`, rounded, or as many as there are at `fps`, from `min_frames` to
    `max_frames`; with neither, every frame is kept. Four frames of ten are [0, 2, 5, 7] for
    transformers, which never reaches the last one, and [0, 3, 6, 9] for qwen-vl-utils.

    Args:
        total_frames: frames of the video
        num_frames: frames to keep
        fps: frames to keep of each second
        source_fps: frames that each second of the video has; needed with `fps`
        min_frames: fewest frames to keep with `fps`
        max_frames: most frames to keep with `fps`
        temporal_patch_size: frames in a patch
        sampling: rule of transformers or of qwen-vl-utils, "hf" or "qwen_vl_utils"

    Source: `sample_frames` of transformers' video_processing_qwen2_vl.py; `smart_nframes` of
    qwen-vl-utils' vision_process.py. Where the former's floating-point steps reach one past the
    last frame, which is an IndexError there, that step is left out.

    Raises:
        ValueError: if `sampling` is unknown, both `num_frames` and `fps` are given, `fps` is given
            without `source_fps`, or fewer than one patch or more than all frames are asked for.
    """
    if sampling not in DEFAULT_FPS:
        raise ValueError(f"sampling is one of {list(DEFAULT_FPS)}, got {sampling!r}")
    check_sampling(num_frames=num_frames, fps=fps, min_frames=min_frames, max_frames=max_frames)
    t = temporal_patch_size
    if num_frames is not None:
        count = round(num_frames / t) * t
    elif fps is None:
        return torch.arange(total_frames)
    elif source_fps is None:
        raise ValueError(f"sampling at fps={fps} needs the rate of the video; give it as 'fps'")
    else:
        fewest = min_frames if sampling == "hf" else math.ceil(min_frames / t) * t
        most = min(max_frames, total_frames)
        count = math.floor(min(max(total_frames / source_fps * fps, fewest), most) / t) * t
    if not t <= count <= total_frames:
        raise ValueError(
            f"at least {t} and at most all {total_frames} frames can be kept, got {count} by "
            f"num_frames={num_frames}, fps={fps}; change these or drop the video"
        )
    if sampling == "hf":
        return torch.arange(0, total_frames, total_frames / count)[:count].long()
    return torch.linspace(0, total_frames - 1, count).round().long()


def check_sampling(
    *, num_frames: Any = None, fps: Any = None, min_frames: Any = 4, max_frames: Any = 768
) -> None:
    """Refuse numbers of `sample_frames` that are right for no video.

    Raises:
        ValueError: naming the first of them.
    """
    counts = {"num_frames": num_frames, "min_frames": min_frames, "max_frames": max_frames}
    if num_frames is None:
        counts.pop("num_frames")
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is a whole number above 0, got {value!r}; correct it")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise ValueError(f"fps is a number above 0, got {fps!r}; correct it")
    if min_frames > max_frames:
        raise ValueError(
            f"frames kept are between min_frames and max_frames, got {min_frames} and "
            f"{max_frames}; are they swapped?"
        )
    if num_frames is not None and fps is not None:
        raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other; give one")


class Qwen25VLVideoTransform:
    """The frames of one video -> the patches and the grid that the vision encoder takes.

    Equal under `torch.equal` to `Qwen2VLVideoProcessor` of transformers. PIL frames of any mode are
    made RGB as images are; there, only RGB frames are read.

    Args:
        min_pixels: pixels under which a frame is enlarged
        max_pixels: pixels over which a frame is shrunk
        total_pixels: most pixels of a whole video, where the frames of one patch count once; it
            lowers `max_pixels` for long videos, but not below 1.05 * `min_pixels`; None for no
            such limit; qwen-vl-utils takes 90316800, which is 0.9 * 128000 placeholders
        num_frames: frames to keep
        fps: frames to keep of each second
        min_frames: fewest frames to keep with `fps`
        max_frames: most frames to keep with `fps`
        sampling: rule by which frames are kept, "hf" or "qwen_vl_utils" (`sample_frames`)
        patch_size: pixels on each side of a patch
        merge_size: patches on each side of a placeholder
        temporal_patch_size: frames in a patch; the last frame is repeated to fill it
        image_mean: mean of each channel, where full intensity is 1
        image_std: standard deviation of each channel, where full intensity is 1
        dtype: dtype of the patches; the arithmetic is float32 in any case

    Raises:
        ValueError: if not `0 < min_pixels <= max_pixels`, or numbers of frames are right for no
            video (`check_sampling`).
    """

    def __init__(
        self,
        *,
        min_pixels: int = 100352,
        max_pixels: int = 602112,
        total_pixels: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        min_frames: int = 4,
        max_frames: int = 768,
        sampling: Literal["hf", "qwen_vl_utils"] = "hf",
        patch_size: int = PATCH_SIZE,
        merge_size: int = SPATIAL_MERGE_SIZE,
        temporal_patch_size: int = TEMPORAL_PATCH_SIZE,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.patchify = Patchify(
            patch_size=patch_size,
            merge_size=merge_size,
            temporal_patch_size=temporal_patch_size,
            image_mean=image_mean,
            image_std=image_std,
            dtype=dtype,
        )
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.total_pixels = total_pixels
        self.sampling: dict[str, Any] = {
            "num_frames": num_frames,
            "fps": fps,
            "min_frames": min_frames,
            "max_frames": max_frames,
            "temporal_patch_size": temporal_patch_size,
            "sampling": sampling,
        }
        smart_resize(1, 1, min_pixels=min_pixels, max_pixels=max_pixels)  # refuses bad limits now
        check_sampling(num_frames=num_frames, fps=fps, min_frames=min_frames, max_frames=max_frames)

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Add the patches of the frames under "video".

        Args:
            sample: "video", a sequence of PIL images, or uint8 tensors or arrays of 1 or 3
                channels, all frames of one size; optionally "fps", the frames that each second of
                it has

        Returns:
            The sample with "pixel_values_videos" [p, c * t * s * s], "video_grid_thw", int64
            [1, 3], and "second_per_grid_ts", the seconds that t frames last.

        Raises:
            ValueError: if it is no video that can be read, sampled (`sample_frames`) or resized
                (`smart_resize`).
        """
        frames, source_fps = _frames(sample["video"]), sample.get("fps")
        if source_fps is not None and source_fps <= 0:
            raise ValueError(f"frames pass at a positive rate, got fps={source_fps}; omit 'fps'")
        kept = sample_frames(len(frames), source_fps=source_fps, **self.sampling).tolist()
        height, width = smart_resize(
            *size(frames[0]),
            factor=self.patchify.factor,
            min_pixels=self.min_pixels,
            max_pixels=self._max_pixels(len(kept)),
        )
        pixel_values, grid_thw = self.patchify(
            (resized_rgbx(frames[k], height, width) for k in kept), len(kept), height, width
        )
        if source_fps is None:
            kept_fps = DEFAULT_FPS[self.sampling["sampling"]]
            _say_assumed_rate(kept_fps)
        else:
            kept_fps = len(kept) / len(frames) * source_fps
        return {
            **sample,
            "pixel_values_videos": pixel_values,
            "video_grid_thw": grid_thw,
            "second_per_grid_ts": self.patchify.temporal_patch_size / kept_fps,
        }

    def _max_pixels(self, num_frames: int) -> int:
        """Return the most pixels of one frame, where so many share `total_pixels`."""
        if self.total_pixels is None:
            return self.max_pixels
        share = self.total_pixels * self.patchify.temporal_patch_size // num_frames
        return max(min(self.max_pixels, share), int(1.05 * self.min_pixels))


GEOMETRY = {"patch_size", "merge_size", "temporal_patch_size"}
VIDEO = [name for name in signature(Qwen25VLVideoTransform).parameters if name not in GEOMETRY]
"""Arguments that a model leaves open."""


@functools.cache
def _say_assumed_rate(fps: float) -> None:
    """Log once in a process at what rate frames are taken to pass that come without one."""
    get_logger("WARNING").warning(
        f"frames of a video came without 'fps' and are taken to pass at {fps} a second, as "
        f"{'transformers' if fps == DEFAULT_FPS['hf'] else 'qwen-vl-utils'} does: their times, and "
        "so their positions, are those of such a video; give 'fps' beside the frames"
    )


def _frames(video: Any) -> list[Image.Image | Tensor]:
    """Return the frames as `as_pixels` gives them, or raise ValueError."""
    is_stack = isinstance(video, Tensor | np.ndarray) and video.ndim == 4
    if not is_stack and not isinstance(video, list | tuple):
        raise ValueError(
            "a video is a list of frames, or a uint8 tensor or array of four axes, got "
            f"{type(video).__name__}; files are read by the loader in torchtune_qwen25vl.media"
        )
    frames = [as_pixels(frame, channels=(1, 3)) for frame in video]
    sizes = {size(frame) for frame in frames}
    if len(sizes) != 1:
        raise ValueError(
            f"a video has frames, all of one height and width, got {len(frames)} frames of the "
            f"sizes {sorted(sizes)}; resize them or drop the video"
        )
    return frames
