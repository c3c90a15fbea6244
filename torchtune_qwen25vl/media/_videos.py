"""Video files -> the frames a transform keeps, decoded without ever holding the others.

Needs PyAV, the optional extra `video`.
"""

import math
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from torchtune_qwen25vl.media._sources import locate
from torchtune_qwen25vl.transform import sample_frames

SAMPLING = ("num_frames", "fps", "min_frames", "max_frames")


def load_video(
    source: Any, *, sampling: Mapping[str, Any], root: Path | None = None
) -> tuple[list[Image.Image], float]:
    """Decodes the sampled frames of a video file, upright and RGB, and says at what rate they play.

    Args:
        source: a path, a ``file://`` or ``data:`` URL, bytes, or the ``{"bytes", "path"}`` mapping
            that `datasets` stores.
        sampling: arguments of `sample_frames`, as in `Qwen25VLVideoTransform.sampling`.
        root: folder that relative paths start from; None allows absolute paths only.

    Returns:
        the frames kept, and frames kept per second of video.

    Raises:
        ImportError: if PyAV is not installed.
        ValueError: naming the file, if it is missing, empty, no video, damaged, cut short, or more
            than `max_frames` of its frames would be kept.
    """
    name, file = locate(source, root)
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV; install torchtune-qwen25vl[video]") from error
    try:
        total, fps = _count(av, name, file)
        while True:
            kept = _kept(name, total, fps, sampling)
            frames, seen = _decode(av, file, set(kept))
            if seen == total:
                return [frames[k] for k in kept], len(kept) / total * fps
            total = seen  # frames at a cut that need others before it are not decoded
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{name}: cannot be read as a video ({error})") from error


def resampled_rate(num_frames: int, fps: float, sampling: Mapping[str, Any]) -> float:
    """A rate, at most rounding errors below `fps`, at which sampling these frames keeps them all.

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


def _kept(name: str, total: int, fps: float, sampling: Mapping[str, Any]) -> list[int]:
    try:
        kept = sample_frames(total, source_fps=fps, **sampling).tolist()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if len(kept) > sampling["max_frames"]:
        raise ValueError(
            f"{name}: {len(kept)} frames would be kept, more than max_frames="
            f"{sampling['max_frames']}; set video.fps of the tokenizer"
        )
    return kept


def _count(av: Any, name: str, file: Path | bytes) -> tuple[int, float]:
    """Frames that will be shown, counted without decoding them, and frames per second."""
    with _opened(av, file) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        if len(packets) < stream.frames:
            raise ValueError(
                f"{name}: cut short, {len(packets)} of {stream.frames} frames are left"
            )
        shown = sum(not packet.is_discard for packet in packets)
        return shown, float(stream.average_rate)


def _decode(av: Any, file: Path | bytes, kept: set[int]) -> tuple[dict[int, Image.Image], int]:
    """The frames to be kept by their number, and how many there are in all."""
    frames, seen = {}, 0
    with _opened(av, file) as container:
        for frame in container.decode(video=0):
            if seen in kept:
                frames[seen] = frame.to_image().rotate(frame.rotation, expand=True)
            seen += 1
    return frames, seen


def _opened(av: Any, file: Path | bytes) -> Any:
    return av.open(BytesIO(file) if isinstance(file, bytes) else str(file))
