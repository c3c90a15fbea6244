"""What passes through both models on one batch, recorded layer by layer."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parity import reference
from parity.inputs import LAYOUTS, Inputs, make_inputs
from torchtune_qwen25vl import Qwen25VL, hf_to_tune, qwen2_5_vl_from_config
from torchtune_qwen25vl._position_ids import window_order
from torchtune_qwen25vl.weights import materialize


@dataclass
class Trace:
    """Hidden states of one forward, on the CPU."""

    vision_layers: list[Tensor] = field(default_factory=list)  # [p, d_vision], in window order
    encoder: Tensor | None = None  # [m, d]
    decoder_layers: list[Tensor] = field(default_factory=list)  # [b, s, d]
    logits: Tensor | None = None  # [b, s, v]

    def states(self) -> list[Tensor]:
        """All of it, in the order of the data flow."""
        assert self.encoder is not None
        assert self.logits is not None
        return [*self.vision_layers, self.encoder, *self.decoder_layers, self.logits]


def ours_like(
    theirs: nn.Module, *, config: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> Qwen25VL:
    """Our model with their weights.

    In their dtype both share memory wherever the layouts allow, so that two models of a real
    checkpoint fit where one does.
    """
    with torch.device("meta"):
        model = qwen2_5_vl_from_config(config or reference.config_dict(theirs))
    weights = hf_to_tune(reference.disk_state_dict(theirs)).items()
    materialize(model, weights, device=next(theirs.parameters()).device, dtype=dtype)
    return model.eval()


@functools.lru_cache(maxsize=64)
def inputs_for(layout: str, model: str, device: str = "cpu") -> Inputs:
    """A batch of this layout, in the ids of this reference model."""
    ids = reference.ids(reference.model(model))
    contrast = 0.03 if "faint" in layout else 1.0
    return make_inputs(LAYOUTS[layout], ids, contrast=contrast).to(device)


@contextmanager
def _recording(layers: Any, states: list[Tensor]) -> Iterator[None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        states.append(hidden.detach().cpu())

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace_model(theirs: nn.Module, inputs: Inputs) -> Trace:
    """Their forward with Qwen's positions passed in."""
    trace = Trace()
    with torch.no_grad():
        with _recording(reference.vision_layers(theirs), trace.vision_layers):
            trace.encoder = reference.encode(theirs, inputs).cpu()
        with _recording(reference.decoder_layers(theirs), trace.decoder_layers):
            trace.logits = theirs(**reference.forward_kwargs(inputs)).logits.cpu()
    return trace


@functools.lru_cache(maxsize=32)
def trace_theirs(model: str, layout: str, device: str = "cpu") -> Trace:
    """Their forward on a model and a layout by name."""
    return trace_model(reference.model(model, device), inputs_for(layout, model, device))


def trace_ours(model: Qwen25VL, inputs: Inputs) -> Trace:
    """Our forward on the same batch."""
    trace = Trace()
    with torch.no_grad():
        with _recording(model.vision.layers, trace.vision_layers):
            trace.encoder = model.vision(**inputs.ours["encoder_input"]["vision"]).cpu()
        trace.vision_layers = _in_window_order(model.vision, inputs, trace.vision_layers)
        with _recording(model.layers, trace.decoder_layers):
            trace.logits = model(**inputs.ours).cpu()
    return trace


def _in_window_order(vision: Any, inputs: Inputs, states: list[Tensor]) -> list[Tensor]:
    """Our states [p, d_vision] in the order of theirs; ours has sorted the windows of a frame."""
    grids = inputs.grid_thw.tolist()
    sizes = {name: getattr(vision, name) for name in ("spatial_merge_size", "patch_size")}
    window_size, unit = vision.window_size, vision.spatial_merge_size**2
    theirs, _ = window_order(grids, window_size=window_size, **sizes)
    moved = vision.arrange(grids).order.argsort()[theirs]  # [m]
    return [state.unflatten(0, (-1, unit))[moved].flatten(0, 1) for state in states]


def _their_loss(model: str, layout: str, device: str) -> Tensor:
    inputs = inputs_for(layout, model, device)
    kwargs = reference.forward_kwargs(inputs)
    return reference.model(model, device)(**kwargs, labels=inputs.labels).loss


@functools.lru_cache(maxsize=32)
def loss_theirs(model: str, layout: str, device: str) -> float:
    """Their loss: all logits, mean over the labelled tokens."""
    with torch.no_grad():
        return float(_their_loss(model, layout, device))


@functools.lru_cache(maxsize=16)
def gradients_theirs(model: str, layout: str, device: str) -> dict[str, Tensor]:
    """The gradient of their loss for every parameter, in tune layout (renaming is linear)."""
    parameters = dict(reference.model(model, device).named_parameters())
    gradients = torch.autograd.grad(
        _their_loss(model, layout, device), list(parameters.values()), materialize_grads=True
    )
    return hf_to_tune(dict(zip(parameters, gradients, strict=True)))
