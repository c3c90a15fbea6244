"""What vLLM does otherwise, as data: each deviation is a fault of ours that equals it.

A question passes as a deviation only if ours, asked again under the fault, gives vLLM's answer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.faults import FAULTS, Fault
from parity.faults._fault import replaced
from torchtune_qwen25vl import Qwen25VLTransform, Qwen25VLVideoTransform, mrope_position_ids

MODELS = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models"
CASTS = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/multimodal/processing/context.py"


@dataclass(frozen=True)
class VllmDeviation:
    """What vLLM does otherwise with videos.

    Attributes:
        stage: the first stage that differs
        what: in a few words
        thread: where it is reported, or its source
        fault: makes the fault that equals it, for a folder's transform
    """

    stage: str
    what: str
    thread: str
    fault: Callable[[Qwen25VLTransform], Fault]


def _limits_of_images(transform: Qwen25VLTransform) -> Fault:
    limits = {"min_pixels": transform.min_pixels, "max_pixels": transform.max_pixels}

    def wrap(right: Callable) -> Callable:
        def wrong(self: Any, sample: dict[str, Any]) -> dict[str, Any]:
            other = copy.copy(self)
            vars(other).update(limits)
            return right(other, sample)

        return wrong

    return replaced(Qwen25VLVideoTransform, wrap, "pixels", method="__call__")


def _in_bf16(_: Qwen25VLTransform) -> Fault:
    def wrap(right: Callable) -> Callable:
        def wrong(
            tokens: Tensor, images: Tensor, videos: Tensor, seconds: Any, **options: Any
        ) -> Tensor:
            rounded = torch.tensor(seconds, dtype=torch.bfloat16).tolist()
            return right(tokens, images, videos, rounded, **options)

        return wrong

    return replaced(mrope_position_ids, wrap, "positions")


REFUSALS = {  # question -> why vLLM 0.32.0 ends with an error where the vision encoder has adapters
    "image beside video": "rows of images and videos in one step, of one request or of several, "
    "are counted together for an adapter that is applied to either"
}
VLLM_DEVIATIONS: tuple[VllmDeviation, ...] = (
    VllmDeviation(
        "pixels",
        "takes the limits of images for videos where a folder says nothing about videos, as its "
        "transformers does; ours are those of qwen-vl-utils",
        "https://github.com/huggingface/transformers/pull/38105",
        _limits_of_images,
    ),
    VllmDeviation(
        "positions",
        "multiplies the time of frame groups in fp64, Qwen's training code does it in fp32",
        f"{MODELS}/qwen2_5_vl.py",
        lambda _: FAULTS["time of frames in fp64"],
    ),
    VllmDeviation(
        "positions",
        "rounds the seconds between frame groups to bf16 with a model in bf16",
        CASTS,
        _in_bf16,
    ),
)
