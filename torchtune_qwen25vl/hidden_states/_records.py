"""How a row ended: what the journal holds of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """How one row ended.

    Attributes:
        name: of the row
        state: done; failed, for `reason`
        reason: of failed
        asked: what was asked
        stamp: state of its files
        answer: that the model gave
        finish: "stop", or "length" where the answer was cut; empty without an answer
        tokens: of the prompt
        places: of states that are no vectors but [n, width], by selector
    """

    name: str
    state: str
    reason: str = ""
    asked: str = ""
    stamp: str = ""
    answer: str = ""
    finish: str = ""
    tokens: int = 0
    places: Mapping[str, Sequence[int]] = field(default_factory=dict)
