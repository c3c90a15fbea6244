"""The model: every vision layer, the encoder, every decoder layer, logits, loss, gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from parity import reference
from parity.inputs import LAYOUTS, Inputs
from parity.stages._stage import Measurement, Setting, Stage, max_error, relative_frobenius
from parity.trace import (
    Trace,
    gradients_theirs,
    inputs_for,
    loss_theirs,
    trace_model,
    trace_ours,
    trace_theirs,
)
from torchtune_qwen25vl import Qwen25VL
from torchtune_qwen25vl.training import summed_loss

# Every layout on the small models; one layout tells enough about depth, width and heavy tails.
CASES = [
    *(("tiny", layout) for layout in LAYOUTS),
    *(("tied", layout) for layout in ("image", "mixed batch")),
    ("quiet", "image"),
    ("stress", "mixed batch"),
    ("deep", "two images"),
    ("wide", "image"),
    ("wide_tied", "image"),
]
SMALL = ("tiny", "tied", "quiet")


def cases(setting: Setting) -> list[tuple[str, str]]:
    """Pairs of model and layout."""
    if setting.checkpoint:
        return [(setting.checkpoint, layout) for layout in LAYOUTS]
    return [case for case in CASES if case[0] in SMALL or not setting.small]


def _traces(setting: Setting) -> Iterator[tuple[str, Trace, Trace, Inputs]]:
    for name, layout in cases(setting):
        inputs = inputs_for(layout, name, setting.device)
        theirs = trace_theirs(name, layout, setting.device)
        ours = trace_ours(setting.ours_like(reference.model(name, setting.device)), inputs)
        yield f"{name}: {layout}", ours, theirs, inputs.to("cpu")


def _scaled(states: Tensor) -> float:
    """The tolerance of a residual stream: fp32 noise grows with what is in it."""
    return 1e-5 * max(1.0, float(states.abs().max()))


def _layers(
    setting: Setting, states: Callable[[Trace], list[Tensor]], vision: bool
) -> Iterator[Measurement]:
    for case, ours, theirs, inputs in _traces(setting):
        kept = ... if vision else inputs.attention_mask.bool()
        pairs = zip(states(ours), states(theirs), strict=True)
        for number, (mine, their) in enumerate(pairs):
            mine, their = mine[kept], their[kept]
            yield Measurement(f"{case}, layer {number}", max_error(mine, their), _scaled(their))


def measure_vision_layers(setting: Setting) -> Iterator[Measurement]:
    """Hidden states after every block, in window order."""
    yield from _layers(setting, lambda trace: trace.vision_layers, vision=True)


def measure_decoder_layers(setting: Setting) -> Iterator[Measurement]:
    """Hidden states after every layer, at every token that is no padding."""
    yield from _layers(setting, lambda trace: trace.decoder_layers, vision=False)


def measure_encoder(setting: Setting) -> Iterator[Measurement]:
    """What the encoder returns, in the order of the placeholders."""
    for case, ours, theirs, _ in _traces(setting):
        assert ours.encoder is not None
        assert theirs.encoder is not None
        yield Measurement(case, max_error(ours.encoder, theirs.encoder), _scaled(theirs.encoder))


def measure_logits(setting: Setting) -> Iterator[Measurement]:
    """Logits at every token that is no padding."""
    for case, ours, theirs, inputs in _traces(setting):
        assert ours.logits is not None
        assert theirs.logits is not None
        kept = inputs.attention_mask.bool()
        unit_scale = not setting.checkpoint and not case.startswith("stress")
        tolerance = 2e-5 if unit_scale else _scaled(theirs.logits[kept])
        yield Measurement(case, max_error(ours.logits[kept], theirs.logits[kept]), tolerance)


def measure_bits(setting: Setting) -> Iterator[Measurement]:
    """Everything after the patch embedding, on rows without padding."""
    for name, layout in cases(setting):
        theirs = reference.model(name, setting.device)
        inputs = inputs_for(layout, name, setting.device)
        if not inputs.attention_mask.all():
            continue  # theirs then attends through a mask, in a kernel of another summation order
        with reference.linear_patch_embed(theirs):
            their = trace_model(theirs, inputs)
        our = trace_ours(setting.ours_like(theirs), inputs)
        error = max(
            max_error(mine, right) for mine, right in zip(our.states(), their.states(), strict=True)
        )
        yield Measurement(f"{name}: {layout}", error)


def loss_ours(model: Qwen25VL, inputs: Inputs) -> Tensor:
    """The mean loss of labelled rows only, as the flagship recipe computes it."""
    return summed_loss(model, {**inputs.ours, "labels": inputs.labels}) / inputs.label_count


def measure_loss(setting: Setting) -> Iterator[Measurement]:
    """Relative difference of the loss: theirs from all logits, ours from labelled rows alone."""
    for name, layout in cases(setting):
        inputs = inputs_for(layout, name, setting.device)
        model = setting.ours_like(reference.model(name, setting.device))
        with torch.no_grad():
            ours = float(loss_ours(model, inputs))
        theirs = loss_theirs(name, layout, setting.device)
        yield Measurement(f"{name}: {layout}", abs(ours - theirs) / abs(theirs), 2e-6)


def measure_gradients(setting: Setting) -> Iterator[Measurement]:
    """Relative Frobenius difference of the gradient of every parameter."""
    for name, layout in cases(setting):
        model = setting.ours_like(reference.model(name, setting.device)).requires_grad_(True)
        loss_ours(model, inputs_for(layout, name, setting.device)).backward()
        ours = {name: parameter.grad for name, parameter in model.named_parameters()}
        theirs = gradients_theirs(name, layout, setting.device)
        assert ours.keys() == theirs.keys()
        yield from _gradient_errors(f"{name}: {layout}", ours, theirs)


def _gradient_errors(
    case: str, ours: dict[str, Tensor | None], theirs: dict[str, Tensor]
) -> Iterator[Measurement]:
    """The worst parameter; k biases apart, whose true gradient is 0 and what is left is noise."""
    errors, k_bias_errors = [], []
    for name, their in theirs.items():
        mine = ours[name]
        mine = torch.zeros_like(their) if mine is None else mine
        if name.endswith("k_proj.bias"):
            k_bias_errors.append(max_error(mine, their))
        else:
            errors.append(relative_frobenius(mine, their))
    yield Measurement(f"{case}, {len(errors)} tensors", max(errors), 1e-4)
    yield Measurement(f"{case}, {len(k_bias_errors)} k biases", max(k_bias_errors), 1e-6)


VISION_LAYERS = Stage(
    name="vision layers",
    what="hidden states after every block of the vision encoder, in window order",
    tolerance="1e-5 * max(1, absmax): four times the fp32 noise between eager and SDPA attention",
    fault="vision rows and columns swapped",
    measure=measure_vision_layers,
)
ENCODER = Stage(
    name="encoder",
    what="the vision encoder's embeddings, in the order of the placeholders",
    tolerance="1e-5 * max(1, absmax): four times the fp32 noise between eager and SDPA attention",
    fault="windows not undone",
    measure=measure_encoder,
)
DECODER_LAYERS = Stage(
    name="decoder layers",
    what="hidden states after every decoder layer",
    tolerance="1e-5 * max(1, absmax): twice the fp32 noise between eager and SDPA attention",
    fault="one-axis positions",
    measure=measure_decoder_layers,
)
LOGITS = Stage(
    name="logits",
    what="logits of every token, at unit scale",
    tolerance="2e-5: four times the fp32 noise, a third of the smallest real bug (text eps 1e-5)",
    fault="k bias dropped",
    measure=measure_logits,
)
BITS = Stage(
    name="bits",
    what="hidden states of every layer, embeddings and logits, with their Conv3d patch embedding "
    "computed as the matrix product it is (ours is nearer to fp64 than the convolution)",
    tolerance="0: the same operations in the same order",
    fault="bf16 rotary tables",
    measure=measure_bits,
)
LOSS = Stage(
    name="loss",
    what="relative difference of the loss; ours projects labelled rows only",
    tolerance="2e-6: the order in which some hundred fp32 terms are added",
    fault="labels shifted twice",
    measure=measure_loss,
)
GRADIENTS = Stage(
    name="gradients",
    what="relative Frobenius difference of the gradient of every parameter",
    tolerance="1e-4, ten times the fp32 noise; k bias 1e-6 absolute, for its true gradient is 0",
    fault="gradient of the encoder cut",
    measure=measure_gradients,
)
