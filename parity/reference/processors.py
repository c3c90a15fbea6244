"""Their processors: images and conversations to tensors."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
)

try:  # transformers 5: the torchvision backend bears the plain name
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
except ImportError:  # transformers 4.57
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
        Qwen2VLImageProcessor as Qwen2VLImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl_fast import (
        Qwen2VLImageProcessorFast as Qwen2VLImageProcessor,
    )
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # noqa: F401
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata


def image_processor(min_pixels: int = 3136, max_pixels: int = 1003520, **kwargs: Any) -> Any:
    """The default (torchvision) image processor with these limits in force."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen2VLImageProcessor(size=size, **kwargs)


def pillow_image_processor(min_pixels: int = 3136, max_pixels: int = 1003520) -> Any:
    """The Pillow image processor, whose resize depends on the Pillow that is installed."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": min_pixels, "longest_edge": max_pixels})


def video_processor(**kwargs: Any) -> Any:
    """The video processor; sampling is off unless asked for."""
    return Qwen2VLVideoProcessor(**kwargs)


def video_patches(
    frames: Any,
    *,
    source_fps: float | None = None,
    sampling: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, float]:
    """Their pixel_values_videos, video_grid_thw and second_per_grid_ts of one video.

    `sampling` holds num_frames or fps; `settings` are the video processor's own.
    """
    processor = video_processor(**settings)
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
        rate = metadata.sampled_fps
    else:  # transformers 4.57 does not tell
        rate = len(metadata.frames_indices) / len(frames) * (source_fps or 24)
    seconds = processor.temporal_patch_size / rate
    return output["pixel_values_videos"], output["video_grid_thw"], seconds


def processor(folder: Path, **limits: int) -> Any:
    """The processor with the tokenizer in this folder and the published chat template."""
    return Qwen2_5_VLProcessor(
        image_processor=image_processor(**limits),
        tokenizer=Qwen2TokenizerFast.from_pretrained(folder),
        video_processor=video_processor(),
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text("utf-8"),
    )


def pixel_limits(source: str) -> tuple[int, int]:
    """min_pixels and max_pixels of a checkpoint's own processor settings."""
    size = Qwen2VLImageProcessor.from_pretrained(source).size
    return size["shortest_edge"], size["longest_edge"]
