"""The same model with its weights packed for oneDNN, as it answers on a CPU of AMD."""

from collections.abc import Iterator
from dataclasses import replace

from parity.stages._stage import Measurement, Setting, Stage
from parity.stages.generation import measure_greedy
from parity.stages.hidden_states import measure_hidden_states
from parity.stages.model import measure_decoder_layers, measure_logits, measure_vision_layers

AGAIN = {
    "vision layers": measure_vision_layers,
    "decoder layers": measure_decoder_layers,
    "logits": measure_logits,
    "greedy": measure_greedy,
    "hidden states": measure_hidden_states,
}


def measure_packed_weights(setting: Setting) -> Iterator[Measurement]:
    """The cases of the stages named, each within its own tolerance; of tokens a few."""
    setting = replace(setting, device="cpu", packs=True)
    for stage, measure in AGAIN.items():
        asked = replace(setting, small=True) if stage == "greedy" else setting
        for measurement in measure(asked):
            yield replace(measurement, case=f"{stage}: {measurement.case}")


PACKED_WEIGHTS = Stage(
    "packed weights",
    "vision layers to tokens with weights packed for oneDNN, on the CPU",
    "those of each stage: another library sums fp32 in another order, and no more",
    "a packed bias lost",
    measure_packed_weights,
)
