"""bf16: ours may be no further from the exact answer than theirs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from parity import reference
from parity.inputs import LAYOUTS, Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage
from parity.trace import Trace, trace_model, trace_ours

MODELS = ("tiny", "stress", "deep")
BATCHES = [(layout, seed) for layout in ("two images", "mixed batch", "video") for seed in range(3)]


def measure_bf16(setting: Setting) -> Iterator[Measurement]:
    """How much larger our bf16 error is than theirs, over fp32 with the same weights.

    Pooled over batches: one rounding early on moves everything after it, so that a single batch
    is one draw of noise, and the ratio of two draws says little.
    """
    for name in MODELS[:1] if setting.small else MODELS:
        exact, rounded = reference.in_two_precisions(name, setting.device)
        model = setting.ours_like(rounded)
        squares: dict[str, Tensor] = {}
        for layout, seed in BATCHES:
            inputs = make_inputs(LAYOUTS[layout], reference.IDS, seed=seed).to(setting.device)
            right = _outputs(trace_model(exact, inputs), inputs)
            theirs = _outputs(trace_model(rounded, inputs), inputs)
            ours = _outputs(trace_ours(model, inputs), inputs)
            for part, answer in right.items():
                errors = torch.stack([ours[part] - answer, theirs[part] - answer])
                squares[part] = squares.get(part, torch.zeros(2)) + errors.square().sum((1, 2))
        for part, (our_square, their_square) in squares.items():
            ratio = float((our_square / their_square).sqrt())
            yield Measurement(f"{name}, {part}", max(0.0, ratio - 1), 0.1)


def _outputs(trace: Trace, inputs: Inputs) -> dict[str, Tensor]:
    assert trace.encoder is not None
    assert trace.logits is not None
    kept = inputs.attention_mask.bool().cpu()
    return {"encoder": trace.encoder.float(), "logits": trace.logits[kept].float()}


BF16 = Stage(
    name="bf16",
    what="our bf16 error (relative Frobenius, against fp32 with the same weights) over theirs",
    tolerance="a tenth more than theirs: rounding is noise, and no fixed bound is fair to it",
    fault="one-axis positions",
    measure=measure_bf16,
)
