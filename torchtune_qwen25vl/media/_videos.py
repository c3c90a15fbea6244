"""Video files to the frames that are kept, decoded without ever holding the others.

Needs PyAV, the optional extra `video`.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from torchtune_qwen25vl.media._sources import locate

Keep = Callable[[int, float], Sequence[int]]
"""Which frames to keep of a video of so many frames, so many of them a second."""


def load_video(
    source: Any, *, keep: Keep, root: Path | None = None
) -> tuple[list[Image.Image], float]:
    """Decode the frames of a video that are kept, upright and RGB.

    Args:
        source: a path, a `file://` or `data:` URL, bytes, or the `{"bytes", "path"}` mapping that
            `datasets` stores
        keep: which frames are kept, by their number from 0 on; called again with a smaller total
            where frames at a cut turn out to need others that are gone
        root: folder that relative paths start from; None allows absolute paths only

    Returns:
        The frames kept, and how many of them pass in a second of the video.

    Raises:
        ImportError: if PyAV is not installed.
        ValueError: naming the file, if it is missing, empty, no video, damaged or cut short, or if
            `keep` refuses it.
    """
    name, file = locate(source, root)
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV; install torchtune-qwen25vl[video]") from error
    total, fps = _read(name, _count, av, file)
    while True:
        kept = _kept(name, keep, total, fps)
        frames, seen = _read(name, _decode, av, file, set(kept))
        if seen == total:
            return [frames[k] for k in kept], len(kept) / total * fps
        total = seen


def _read(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that reads a file, and let whatever it raises name the file."""
    try:
        return function(*arguments)
    except Exception as error:  # FFmpeg's own kinds, and a dozen more on damaged headers
        raise ValueError(f"{name}: cannot be read as a video ({error})") from error


def _kept(name: str, keep: Keep, total: int, fps: float) -> Sequence[int]:
    try:
        return keep(total, fps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _count(av: Any, file: Path | bytes) -> tuple[int, float]:
    """Count the frames that will be shown, without decoding them; return it with their rate."""
    with _opened(av, file) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        if len(packets) < stream.frames:
            raise ValueError(f"cut short, {len(packets)} of {stream.frames} frames are left")
        if stream.average_rate is None:
            raise ValueError("it does not say at what rate its frames pass; is it an image?")
        shown = sum(not packet.is_discard for packet in packets)
        return shown, float(stream.average_rate)


def _decode(av: Any, file: Path | bytes, kept: set[int]) -> tuple[dict[int, Image.Image], int]:
    """Decode the frames to be kept, by their number; return them and how many there are in all."""
    frames, seen = {}, 0
    with _opened(av, file) as container:
        for frame in container.decode(video=0):
            if seen in kept:
                frames[seen] = frame.to_image().rotate(frame.rotation, expand=True)
            seen += 1
    if not seen:
        raise ValueError("it has no frame that can be decoded")
    return frames, seen


def _opened(av: Any, file: Path | bytes) -> Any:
    return av.open(BytesIO(file) if isinstance(file, bytes) else str(file))
