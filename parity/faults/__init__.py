"""Seeded faults: each breaks our package while its context is open, and a stage must see it."""

from parity.faults import (
    generation,
    integers,
    model,
    pixels,
    quantization,
    tokens,
    training,
    weights,
)
from parity.faults._fault import EDITS, Fault

FAULTS: dict[str, Fault] = {
    **pixels.FAULTS,
    **tokens.FAULTS,
    **integers.FAULTS,
    **model.FAULTS,
    **generation.FAULTS,
    **training.FAULTS,
    **weights.FAULTS,
    **quantization.FAULTS,
}

__all__ = ["EDITS", "FAULTS", "Fault"]
