"""Their processors: images, videos and conversations to tensors."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: F401

from parity.reference.refusals import NotThereError

if find_spec("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl"):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
else:  # then the plain name is that of the Pillow backend
    from transformers.models.qwen2_vl.image_processing_qwen2_vl_fast import (
        Qwen2VLImageProcessorFast as Qwen2VLImageProcessor,
    )

try:
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_utils import VideoMetadata
except ImportError:  # before 4.52 the image processor reads videos too

    class VideosByImageProcessor(Qwen2VLImageProcessor):
        """Their image processor, asked for videos."""

        def __call__(self, videos: Any, **kwargs: Any) -> Any:
            """Process videos and no image."""
            return super().__call__(None, videos=videos, **kwargs)

    Qwen2VLVideoProcessor = VideosByImageProcessor


def _limits(min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """Arguments that put limits of pixels in force, by both of their names.

    Up to 4.52 `size` alone is ignored; from 4.54 to 5.17 and beyond `min_pixels` alone becomes the
    default of every later processor (huggingface/transformers, issue 48917).
    """
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return {"size": size, "min_pixels": min_pixels, "max_pixels": max_pixels}


def image_processor(min_pixels: int = 3136, max_pixels: int = 1003520, **kwargs: Any) -> Any:
    """The default (torchvision) image processor with these limits in force."""
    return Qwen2VLImageProcessor(**_limits(min_pixels, max_pixels), **kwargs)


def video_patches(
    frames: Any,
    *,
    source_fps: float | None = None,
    sampling: dict[str, Any] | None = None,
    limits: Mapping[str, int] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, float]:
    """Their pixel_values_videos, video_grid_thw and second_per_grid_ts of one video.

    `sampling` holds num_frames or fps; `limits` min_pixels and max_pixels, where they are not to be
    the default; `settings` are the video processor's own.

    Raises:
        NotThereError: if frames are to be sampled, and this version does not.
    """
    processor = Qwen2VLVideoProcessor(**_limits(**limits) if limits else {}, **settings)
    if hasattr(processor, "sample_frames"):
        output, rate = _sampled(processor, frames, source_fps, sampling)
    elif sampling:
        raise NotThereError("no video processor that samples frames")
    else:  # the processor of conversations takes the rate of the video, or 2
        output, rate = processor(videos=frames, return_tensors="pt"), source_fps or 2.0
    seconds = processor.temporal_patch_size / rate
    return output["pixel_values_videos"], output["video_grid_thw"], seconds


def _sampled(
    processor: Any, frames: Any, source_fps: float | None, sampling: dict[str, Any] | None
) -> tuple[Any, float]:
    """What their video processor makes of a video, and the rate of the frames it kept."""
    output = processor(
        frames,
        do_sample_frames=bool(sampling),
        video_metadata=VideoMetadata(total_num_frames=len(frames), fps=source_fps),
        return_metadata=True,
        return_tensors="pt",
        **sampling or {},
    )
    metadata = output["video_metadata"][0]
    if metadata.frames_indices is None:
        metadata.frames_indices = range(len(frames))
    if hasattr(metadata, "sampled_fps"):
        return output, metadata.sampled_fps
    # transformers 4.57 does not tell
    return output, len(metadata.frames_indices) / len(frames) * (source_fps or 24)


def processor(folder: Path, **limits: int) -> Any:
    """The processor with the tokenizer in this folder and the published chat template."""
    return Qwen2_5_VLProcessor(
        image_processor=image_processor(**limits),
        tokenizer=Qwen2TokenizerFast.from_pretrained(folder),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text("utf-8"),
    )
