"""What vLLM does otherwise, as data."""

from dataclasses import dataclass

SOURCE = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models"


@dataclass(frozen=True)
class Deviation:
    """What vLLM does otherwise in some questions.

    Attributes:
        stage: the first stage that differs
        questions: beginnings of their names
        what: in a few words
        thread: where it is reported, or its source
    """

    stage: str
    questions: tuple[str, ...]
    what: str
    thread: str

    def names(self, question: str, stage: str) -> bool:
        """Whether it says that this question differs first in this stage."""
        return stage == self.stage and question.startswith(self.questions)


DEVIATIONS: tuple[Deviation, ...] = (
    Deviation(
        "pixels",
        ("video", "image beside video"),
        "takes the limits of images for videos where a folder says nothing about videos, as its "
        "transformers does; ours are those of qwen-vl-utils",
        "https://github.com/huggingface/transformers/pull/38105",
    ),
    Deviation(
        "positions",
        ("video, 60 frames at 25 fps", "video, 60 frames at 12.5 fps"),
        "time of a frame group is multiplied in fp64, where Qwen's training code does it in fp32",
        f"{SOURCE}/qwen2_5_vl.py",
    ),
)
