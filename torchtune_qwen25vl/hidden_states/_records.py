"""How a row ended: what the journal holds of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchtune_qwen25vl.jobs import RowRecord


@dataclass(frozen=True)
class Record(RowRecord):
    """How one row ended.

    Attributes:
        answer: answer that the model gave
        finish: "stop", or "length" where the answer was cut; empty without an answer
        tokens: of the prompt
        places: of states that are no vectors but [n, width], by selector
    """

    answer: str = ""
    finish: str = ""
    tokens: int = 0
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
