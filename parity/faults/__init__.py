"""Seeded faults: mistakes that some port has had, or nearly; a stage must see each."""

from parity.faults import (
    conditioning,
    decoder,
    distill,
    encoder,
    generation,
    hidden_states,
    integers,
    packed_weights,
    pixels,
    policy,
    preference,
    quantization,
    tokens,
    training,
    weights,
)
from parity.faults._fault import Fault

FAULTS: dict[str, Fault] = {
    **pixels.FAULTS,
    **tokens.FAULTS,
    **integers.FAULTS,
    **encoder.FAULTS,
    **decoder.FAULTS,
    **generation.FAULTS,
    **hidden_states.FAULTS,
    **conditioning.FAULTS,
    **packed_weights.FAULTS,
    **training.FAULTS,
    **preference.FAULTS,
    **distill.FAULTS,
    **policy.FAULTS,
    **weights.FAULTS,
    **quantization.FAULTS,
}

__all__ = ["FAULTS", "Fault"]
