"""Every stage, in the order in which data flows: the first that diverges names the fault."""

from parity.stages._stage import Measurement, Setting, Stage
from parity.stages.conditioning import PROMPT_EMBEDDINGS
from parity.stages.distill import DISTILL
from parity.stages.generation import GREEDY, PACKED
from parity.stages.hidden_states import HIDDEN_STATES
from parity.stages.model import (
    BITS,
    DECODER_LAYERS,
    ENCODER,
    GRADIENTS,
    LOGITS,
    LOSS,
    VISION_LAYERS,
)
from parity.stages.packed_weights import PACKED_WEIGHTS
from parity.stages.pixels import PIXELS, VIDEO_PIXELS
from parity.stages.policy import POLICY
from parity.stages.positions import POSITIONS, WINDOW_ORDER
from parity.stages.precision import BF16
from parity.stages.preference import PREFERENCE
from parity.stages.quantization import INT4, NF4
from parity.stages.tokens import CHAT_TOKENS
from parity.stages.training import TRAINING
from parity.stages.updates import UPDATES
from parity.stages.weights import WEIGHTS

STAGES: tuple[Stage, ...] = (
    PIXELS,
    VIDEO_PIXELS,
    CHAT_TOKENS,
    POSITIONS,
    WINDOW_ORDER,
    VISION_LAYERS,
    ENCODER,
    DECODER_LAYERS,
    LOGITS,
    BITS,
    LOSS,
    GRADIENTS,
    BF16,
    PACKED,
    GREEDY,
    HIDDEN_STATES,
    PACKED_WEIGHTS,
    PROMPT_EMBEDDINGS,
    TRAINING,
    PREFERENCE,
    DISTILL,
    POLICY,
    UPDATES,
    WEIGHTS,
    NF4,
    INT4,
)

__all__ = ["STAGES", "Measurement", "Setting", "Stage"]
