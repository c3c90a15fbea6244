"""How a row ended: what the journal holds of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchtune_qwen25vl.jobs import RowQuestion, RowRecord


@dataclass(frozen=True)
class Record(RowRecord):
    """How one row ended.

    Attributes:
        answer: answer that the model gave; it may be empty
        finish: "done", "cut" at the length limit, or "looped"; empty where no answer was asked for
        tokens: number of tokens of the answer
        log_probs: log-probability of each choice's letter, where they were asked for
        sizes: size of each image, as it is stored and as the model saw it
    """

    answer: str = ""
    finish: str = ""
    tokens: int = 0
    log_probs: Sequence[float] = ()
    sizes: Sequence[tuple[Sequence[int], Sequence[int]]] = ()


@dataclass(frozen=True)
class Reply:
    """What the model gave for one question, or the reason why it gave nothing."""

    question: RowQuestion
    answer: str = ""
    finish: str = ""
    tokens: int = 0
    log_probs: Sequence[float] = ()
    reason: str = ""
    is_finite: bool = True
