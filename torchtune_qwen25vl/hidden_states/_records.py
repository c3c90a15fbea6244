"""How a row ended: what the journal holds of it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torchtune_qwen25vl.jobs import Row

State = Literal["done", "failed"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Record:
    """How one row ended.

    Attributes:
        name: of the row
        state: done; failed, for `reason`
        reason: of failed
        asked: digest of the question and of the names of its images; of another one the states
            count for nothing
        stamp: size and time of its files; a row that failed is tried again when they change
        answer: that the model gave
        finish: "stop", or "length" where the answer was cut; empty without an answer
        tokens: of the prompt
        places: of states that are no vectors but [n, width], by selector
    """

    name: str
    state: State
    reason: str = ""
    asked: str = ""
    stamp: str = ""
    answer: str = ""
    finish: str = ""
    tokens: int = 0
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)


def digest(question: str, row: Row) -> str:
    """Name what is asked of a row, and about which images."""
    asked = repr((question, row.image_id, len(row.sources)))
    return hashlib.sha256(asked.encode("utf-8", "backslashreplace")).hexdigest()[:16]
