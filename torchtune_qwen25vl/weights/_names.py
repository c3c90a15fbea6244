"""Names and layouts of Qwen2.5-VL weights: Hugging Face's <-> torchtune's.

HF layout is what published checkpoints hold on disk (`visual.*`, `model.layers.*`); the names
transformers 5 uses in memory (`model.visual.*`, `model.language_model.*`) are read as well.
Tune layout is the model's own state dict. Two weights change more than their name, both exactly:

* the vision tower's fused `attn.qkv` is three projections in tune layout: q, k, v stacked by row;
* the patch embedding's Conv3d kernel [e, 3, 2, h, w] is a linear weight [e, 3 * 2 * h * w].

Shapes: e vision width, h = w patch size.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PATCH_EMBED = "visual.patch_embed.proj.weight"

_TABLE: dict[str, tuple[str, ...]] = {  # HF -> tune; {} is the number of the layer
    EMBEDDING: ("tok_embeddings.weight",),
    "model.layers.{}.input_layernorm.weight": ("layers.{}.sa_norm.scale",),
    "model.layers.{}.self_attn.q_proj.weight": ("layers.{}.attn.q_proj.weight",),
    "model.layers.{}.self_attn.q_proj.bias": ("layers.{}.attn.q_proj.bias",),
    "model.layers.{}.self_attn.k_proj.weight": ("layers.{}.attn.k_proj.weight",),
    "model.layers.{}.self_attn.k_proj.bias": ("layers.{}.attn.k_proj.bias",),
    "model.layers.{}.self_attn.v_proj.weight": ("layers.{}.attn.v_proj.weight",),
    "model.layers.{}.self_attn.v_proj.bias": ("layers.{}.attn.v_proj.bias",),
    "model.layers.{}.self_attn.o_proj.weight": ("layers.{}.attn.output_proj.weight",),
    "model.layers.{}.post_attention_layernorm.weight": ("layers.{}.mlp_norm.scale",),
    "model.layers.{}.mlp.gate_proj.weight": ("layers.{}.mlp.w1.weight",),
    "model.layers.{}.mlp.down_proj.weight": ("layers.{}.mlp.w2.weight",),
    "model.layers.{}.mlp.up_proj.weight": ("layers.{}.mlp.w3.weight",),
    "model.norm.weight": ("norm.scale",),
    HEAD: ("output.weight",),
    PATCH_EMBED: ("vision.patch_embed.proj.weight",),
    "visual.blocks.{}.norm1.weight": ("vision.layers.{}.sa_norm.scale",),
    "visual.blocks.{}.attn.qkv.weight": (
        "vision.layers.{}.attn.q_proj.weight",
        "vision.layers.{}.attn.k_proj.weight",
        "vision.layers.{}.attn.v_proj.weight",
    ),
    "visual.blocks.{}.attn.qkv.bias": (
        "vision.layers.{}.attn.q_proj.bias",
        "vision.layers.{}.attn.k_proj.bias",
        "vision.layers.{}.attn.v_proj.bias",
    ),
    "visual.blocks.{}.attn.proj.weight": ("vision.layers.{}.attn.output_proj.weight",),
    "visual.blocks.{}.attn.proj.bias": ("vision.layers.{}.attn.output_proj.bias",),
    "visual.blocks.{}.norm2.weight": ("vision.layers.{}.mlp_norm.scale",),
    "visual.blocks.{}.mlp.gate_proj.weight": ("vision.layers.{}.mlp.w1.weight",),
    "visual.blocks.{}.mlp.gate_proj.bias": ("vision.layers.{}.mlp.w1.bias",),
    "visual.blocks.{}.mlp.down_proj.weight": ("vision.layers.{}.mlp.w2.weight",),
    "visual.blocks.{}.mlp.down_proj.bias": ("vision.layers.{}.mlp.w2.bias",),
    "visual.blocks.{}.mlp.up_proj.weight": ("vision.layers.{}.mlp.w3.weight",),
    "visual.blocks.{}.mlp.up_proj.bias": ("vision.layers.{}.mlp.w3.bias",),
    "visual.merger.ln_q.weight": ("vision.merger.norm.scale",),
    "visual.merger.mlp.0.weight": ("vision.merger.w1.weight",),
    "visual.merger.mlp.0.bias": ("vision.merger.w1.bias",),
    "visual.merger.mlp.2.weight": ("vision.merger.w2.weight",),
    "visual.merger.mlp.2.bias": ("vision.merger.w2.bias",),
}
IN_MEMORY = {"model.": "model.language_model.", "visual.": "model.visual."}  # transformers 5
_LAYER_NUMBER = re.compile(r"(?<=layers\.|blocks\.)\d+")


class Row(NamedTuple):
    """A line of the table with the number of its layer filled in."""

    hf: str
    tune: tuple[str, ...]
    pattern: str  # the HF name with {} for the number


def hf_to_tune(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a complete HF state dict to the model's; the tensors share the input's memory.

    A tied checkpoint has no `lm_head.weight`, and then there is no `output.weight` either.

    Raises:
        ValueError: if names are missing, unknown, or given in both HF layouts.
    """
    names = on_disk_names(state_dict)
    known = {row.hf for row in rows_of(names.values(), side="hf")}
    _refuse_other_names(known, names.values(), optional=HEAD)
    return {
        tune: part
        for key, weight in state_dict.items()
        for tune, part in hf_weight_to_tune(names[key], weight).items()
    }


def hf_weight_to_tune(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Convert one weight, named as on disk, to the one or three weights it is in tune layout."""
    number = _LAYER_NUMBER.search(name)
    row = _TABLE[_LAYER_NUMBER.sub("{}", name, count=1)]
    if name == PATCH_EMBED:
        weight = weight.flatten(1)  # [e, 3, 2, h, w] -> [e, 3 * 2 * h * w]
    parts = weight.chunk(len(row))
    return {tune.format(number and number[0]): part for tune, part in zip(row, parts, strict=True)}


def tune_to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the model's complete state dict to HF's as on disk; the inverse of `hf_to_tune`.

    Raises:
        ValueError: if names are missing or unknown (adapters must be merged first).
    """
    rows = list(rows_of(state_dict, side="tune"))
    known = {tune for row in rows for tune in row.tune}
    _refuse_other_names(known, state_dict, optional=_TABLE[HEAD][0])
    return {
        row.hf: joined(row, [state_dict[tune] for tune in row.tune])
        for row in rows
        if row.tune[0] in state_dict
    }


def on_disk_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each key, in either HF layout, to its name on disk; an unknown key keeps its own.

    Raises:
        ValueError: if a weight is given under both of its names.
    """
    names = {key: renamed(key, {new: old for old, new in IN_MEMORY.items()}) for key in keys}
    both = [key for key, name in names.items() if key != name and name in names]
    if both:
        raise ValueError(
            f"a weight stands under one name; {len(both)} stand under both HF names "
            f"({listed(both)}): keep one of the two layouts"
        )
    return names


def refuse_mismatch(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights, has other ones, or has them in other shapes.

    Args:
        wanted: each weight of the model with its shape, or anything else to compare
        found: each weight of the checkpoint with the same

    Raises:
        ValueError: with the names of the weights, if there are any.
    """
    wrong = [
        f"{name} {list(found[name])} instead of {list(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": wrong,
    }
    said = [f"{len(names)} {what} ({listed(names)})" for what, names in faults.items() if names]
    if said:
        raise ValueError(
            f"weights must be exactly those of the configured Qwen2.5-VL; {'; '.join(said)}: is a "
            f"shard absent, the config another size's, or an adapter not merged?"
        )


def listed(names: Collection[str], few: int = 4) -> str:
    """List the first few of these names for an error message."""
    return ", ".join([*sorted(names)[:few], *["..."][: len(names) > few]])


def rows_of(names: Collection[str], side: str) -> Iterator[Row]:
    """Yield the table for as many layers as these names count, at least one of each tower."""
    of = {"hf": ("model.layers.", "visual.blocks."), "tune": ("layers.", "vision.layers.")}[side]
    decoder, vision = (_count_layers(names, stem) for stem in of)
    for pattern, tune in _TABLE.items():
        layers = vision if pattern.startswith("visual.blocks.") else decoder
        for number in range(layers if "{}" in pattern else 1):
            yield Row(pattern.format(number), tuple(t.format(number) for t in tune), pattern)


def joined(row: Row, parts: Sequence[Tensor]) -> Tensor:
    """Join the one or three tune weights of a row to its HF weight."""
    weight = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if row.hf == PATCH_EMBED:
        patch_size = math.isqrt(weight.shape[1] // 6)
        weight = weight.unflatten(1, (3, 2, patch_size, patch_size))  # [e, 3, 2, h, w]
    return weight


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Exchange the first of these prefixes that the name begins with."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _refuse_other_names(known: set[str], found: Collection[str], optional: str) -> None:
    wanted = known if optional in found else known - {optional}
    refuse_mismatch(dict.fromkeys(wanted), dict.fromkeys(found))


def _count_layers(names: Collection[str], stem: str) -> int:
    numbers = (re.match(rf"{re.escape(stem)}(\d+)\.", name) for name in names)
    return 1 + max((int(number[1]) for number in numbers if number), default=0)
