"""What stands inside their models while a forward runs, by hooks on their modules."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from parity.inputs import Inputs
from parity.reference.outputs import (
    core,
    encode,
    forward_kwargs,
    vision_layers,
    window_order,
)


@contextlib.contextmanager
def first_outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Keep what each of these modules returns when it is called for the first time."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if module not in seen:
            seen.add(module)
            outputs.append(output if isinstance(output, Tensor) else output[0])

    seen = set[nn.Module]()
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def site_outputs(model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> dict[str, Tensor]:
    """What stands at every site of one forward, in the names of our selectors, on the CPU.

    States of the encoder are in reading order; theirs has them window by window.
    """
    text = getattr(model.model, "language_model", model.model)
    kinds = {"layer": text.layers, "attn": [layer.self_attn for layer in text.layers]}
    kinds["mlp"] = [layer.mlp for layer in text.layers]
    modules = {f"{kind}.{k}": m for kind, found in kinds.items() for k, m in enumerate(found)}
    modules |= {"norm": text.norm}
    modules |= {f"vision.{k}": m for k, m in enumerate(vision_layers(model))}
    states: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[site] = (output if isinstance(output, Tensor) else output[0]).cpu()

        return hook

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        states["embed"] = (args[0] if args else kwargs["hidden_states"]).cpu()

    handles = [module.register_forward_hook(keep(site)) for site, module in modules.items()]
    handles.append(text.layers[0].register_forward_pre_hook(enter, with_kwargs=True))
    try:
        with torch.no_grad():
            model(**forward_kwargs(inputs))
            if len(inputs.grid_thw):
                states["merger"] = encode(model, inputs).cpu()
    finally:
        for handle in handles:
            handle.remove()
    if not len(inputs.grid_thw):
        return states
    order, _ = window_order([tuple(grid) for grid in inputs.grid_thw.tolist()])
    reading = order.cpu().argsort()
    for site in states:
        if site.startswith("vision."):
            states[site] = states[site].unflatten(0, (-1, 4))[reading].flatten(0, 1)
    return states


def see(model: Qwen2_5_VLForConditionalGeneration, pixel_values: Tensor, grid_thw: Tensor) -> None:
    """Run the vision tower alone."""
    core(model).visual(pixel_values.to(model.dtype), grid_thw=grid_thw)
