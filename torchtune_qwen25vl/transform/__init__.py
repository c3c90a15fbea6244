"""Conversations, images and videos to samples, samples to batches.

Qwen25VLTransform        torchtune messages with images and videos to one sample
SkipSample               a sample that is too long and left out
Qwen25VLImageTransform   one image to patches
smart_resize             the size an image is resized to
resized                  an image as RGB of another size
Qwen25VLVideoTransform   the frames of a video to patches
sample_frames            which frames of a video are kept
Qwen25VLTokenizer        messages to tokens by the chat template
written_names            names of Qwen's tokens that are written out in a text
PLACEHOLDERS             names of the tokens that stand for images and videos
packed_collate           samples to one row
packed_collate_labelled  the same, with logits of labelled rows only
padded_collate           samples to a row each, padded
padded_collate_labelled  the same, with logits of labelled rows only
PLACEHOLDER_PIXELS       pixels that a placeholder stands for
PATCHES_PER_PLACEHOLDER  patches that become one placeholder
batch_to_device          move a batch, without waiting for the device
round_up                 a length rounded up to a multiple
read_processor           settings of a folder's processor
write_pixel_limits       write the pixel limits of a run into a folder
"""

from torchtune_qwen25vl.transform._collate import (
    packed_collate,
    packed_collate_labelled,
    padded_collate,
    padded_collate_labelled,
    round_up,
)
from torchtune_qwen25vl.transform._device import batch_to_device
from torchtune_qwen25vl.transform._geometry import (
    PATCHES_PER_PLACEHOLDER,
    PLACEHOLDER_PIXELS,
)
from torchtune_qwen25vl.transform._image import Qwen25VLImageTransform, smart_resize
from torchtune_qwen25vl.transform._pixels import resized
from torchtune_qwen25vl.transform._processor import read_processor, write_pixel_limits
from torchtune_qwen25vl.transform._tokenizer import Qwen25VLTokenizer, written_names
from torchtune_qwen25vl.transform._transform import Qwen25VLTransform, SkipSample
from torchtune_qwen25vl.transform._turns import PLACEHOLDERS
from torchtune_qwen25vl.transform._video import Qwen25VLVideoTransform, sample_frames

__all__ = [
    "PATCHES_PER_PLACEHOLDER",
    "PLACEHOLDERS",
    "PLACEHOLDER_PIXELS",
    "Qwen25VLImageTransform",
    "Qwen25VLTokenizer",
    "Qwen25VLTransform",
    "Qwen25VLVideoTransform",
    "SkipSample",
    "batch_to_device",
    "packed_collate",
    "packed_collate_labelled",
    "padded_collate",
    "padded_collate_labelled",
    "read_processor",
    "resized",
    "round_up",
    "sample_frames",
    "smart_resize",
    "write_pixel_limits",
    "written_names",
]
