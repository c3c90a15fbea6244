"""Names and layouts of Qwen2.5-VL weights: Hugging Face's <-> torchtune's, and adapters to PEFT's.

HF layout is what published checkpoints hold on disk (`visual.*`, `model.layers.*`); the names
transformers 5 uses in memory (`model.visual.*`, `model.language_model.*`) are read as well.
Tune layout is the model's own state dict. Two weights change more than their name, both exactly:

* the vision tower's fused `attn.qkv` is three projections in tune layout: q, k, v stacked by row;
* the patch embedding's Conv3d kernel [e, 3, 2, h, w] is a linear weight [e, 3 * 2 * h * w].

Shapes: e vision width, h = w patch size, d_out and d_in of a linear layer, r rank of an adapter.
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
_IN_MEMORY = {"model.": "model.language_model.", "visual.": "model.visual."}  # transformers 5
_LAYER_NUMBER = re.compile(r"(?<=layers\.|blocks\.)\d+")


class _Row(NamedTuple):
    """One line of the table with its layer number filled in."""

    hf: str
    tune: tuple[str, ...]
    pattern: str  # the HF name with {} for the number


def hf_to_tune(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict from a complete HF one; the tensors share the input's memory.

    A tied checkpoint has no `lm_head.weight` and yields no `output.weight`.

    Raises:
        ValueError: if names are missing, unknown, or given in both HF layouts.
    """
    names = on_disk_names(state_dict)
    known = {row.hf for row in _rows(names.values(), side="hf")}
    _refuse_other_names(known, names.values(), optional=HEAD)
    return {
        tune: part
        for key, weight in state_dict.items()
        for tune, part in hf_weight_to_tune(names[key], weight).items()
    }


def hf_weight_to_tune(name: str, weight: Tensor) -> dict[str, Tensor]:
    """One weight under its on-disk HF name, as the one or three weights it is in tune layout."""
    number = _LAYER_NUMBER.search(name)
    row = _TABLE[_LAYER_NUMBER.sub("{}", name, count=1)]
    if name == PATCH_EMBED:
        weight = weight.flatten(1)  # [e, 3, 2, h, w] -> [e, 3 * 2 * h * w]
    parts = weight.chunk(len(row))
    return {tune.format(number and number[0]): part for tune, part in zip(row, parts, strict=True)}


def tune_to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The on-disk HF state dict from the model's complete one; the inverse of `hf_to_tune`.

    Raises:
        ValueError: if names are missing or unknown (adapters must be merged first).
    """
    rows = list(_rows(state_dict, side="tune"))
    known = {tune for row in rows for tune in row.tune}
    _refuse_other_names(known, state_dict, optional=_TABLE[HEAD][0])
    return {
        row.hf: _join(row, [state_dict[tune] for tune in row.tune])
        for row in rows
        if row.tune[0] in state_dict
    }


def on_disk_names(keys: Iterable[str]) -> dict[str, str]:
    """Each key in either HF layout with its on-disk name; unknown keys keep theirs.

    Raises:
        ValueError: if a weight is there under both of its names.
    """
    names = {key: _renamed(key, {new: old for old, new in _IN_MEMORY.items()}) for key in keys}
    both = [key for key, name in names.items() if key != name and name in names]
    if both:
        raise ValueError(
            f"a weight stands under one name; {len(both)} stand under both HF names "
            f"({_listed(both)}): keep one of the two layouts"
        )
    return names


def tune_to_peft(
    adapter: Mapping[str, Tensor], *, rank: int, alpha: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained weights as PEFT's tensors and its adapter config, for the HF model.

    LoRA and DoRA weights become `lora_A`, `lora_B` and `lora_magnitude_vector`. Those of the
    vision q, k and v become one adapter of the fused `qkv`: A stacked [3r, e], B block-diagonal
    [3e, 3r], rank and alpha tripled so that their ratio stays. Other weights, trained in full,
    are exported under `modules_to_save`.

    Args:
        adapter: weights in tune layout; `lora_a`, `lora_b`, `magnitude` after their layer
        rank: rank r of every LoRA layer
        alpha: scale of every LoRA layer: an adapter adds alpha / rank * B @ A

    Raises:
        ValueError: if a weight has no place in the HF model, or DoRA covers vision q, k, v in part.
    """
    left = dict(adapter)
    weights: dict[str, Tensor] = {}
    targets, wider, saved = set(), {}, set()
    for row in _rows(adapter, side="tune"):
        module, _, parameter = _renamed(row.hf, _IN_MEMORY).rpartition(".")
        if all(tune in left for tune in row.tune):
            parts = [left.pop(tune) for tune in row.tune]
            weights[f"base_model.model.{module}.{parameter}"] = _join(row, parts)
            saved.add(module)
        layers = [_pop_lora(left, tune) for tune in row.tune if parameter == "weight"]
        if any(layers):
            pattern = re.escape(_renamed(row.pattern, _IN_MEMORY).rpartition(".")[0])
            pattern = pattern.replace(re.escape("{}"), r"\d+")
            targets.add(pattern)
            lora = layers[0] if len(layers) == 1 else _fuse_lora(layers)
            if (present := sum(map(bool, layers))) > 1:
                wider[pattern] = present
            weights |= {f"base_model.model.{module}.{key}": part for key, part in lora.items()}
    if left or not targets:
        raise ValueError(
            f"an adapter holds LoRA weights of layers the HF model has; {len(left)} of "
            f"{len(adapter)} weights are none such ({_listed(left)}): was the model built by a "
            f"lora_ or qlora_ builder?"
        )
    return weights, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any("magnitude" in key for key in adapter),
        "target_modules": "|".join(sorted(targets)),
        "rank_pattern": {pattern: rank * n for pattern, n in wider.items()},
        "alpha_pattern": {pattern: alpha * n for pattern, n in wider.items()},
        "modules_to_save": sorted(saved) or None,
    }


def refuse_mismatch(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Name the weights that a checkpoint lacks, has too many, or has in another shape.

    Args:
        wanted: each weight with its shape, or anything else to compare
        found: the same of the checkpoint

    Raises:
        ValueError: if there are any.
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
    said = [f"{len(names)} {what} ({_listed(names)})" for what, names in faults.items() if names]
    if said:
        raise ValueError(
            f"weights must be exactly those of the configured Qwen2.5-VL; {'; '.join(said)}: is a "
            f"shard absent, the config another size's, or an adapter not merged?"
        )


def _listed(names: Collection[str], few: int = 4) -> str:
    """The first few of these names, for an error message."""
    return ", ".join([*sorted(names)[:few], *["..."][: len(names) > few]])


def _refuse_other_names(known: set[str], found: Collection[str], optional: str) -> None:
    wanted = known if optional in found else known - {optional}
    refuse_mismatch(dict.fromkeys(wanted), dict.fromkeys(found))


def _rows(names: Collection[str], side: str) -> Iterator[_Row]:
    """The table for as many layers as these names count, at least one of each tower."""
    of = {"hf": ("model.layers.", "visual.blocks."), "tune": ("layers.", "vision.layers.")}[side]
    decoder, vision = (_count_layers(names, stem) for stem in of)
    for pattern, tune in _TABLE.items():
        layers = vision if pattern.startswith("visual.blocks.") else decoder
        for number in range(layers if "{}" in pattern else 1):
            yield _Row(pattern.format(number), tuple(t.format(number) for t in tune), pattern)


def _count_layers(names: Collection[str], stem: str) -> int:
    numbers = (re.match(rf"{re.escape(stem)}(\d+)\.", name) for name in names)
    return 1 + max((int(number[1]) for number in numbers if number), default=0)


def _join(row: _Row, parts: Sequence[Tensor]) -> Tensor:
    """The HF weight of a row from its one or three tune weights."""
    weight = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if row.hf == PATCH_EMBED:
        patch_size = math.isqrt(weight.shape[1] // 6)
        weight = weight.unflatten(1, (3, 2, patch_size, patch_size))  # [e, 3, 2, h, w]
    return weight


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with the first of these prefixes that it has exchanged."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _pop_lora(adapter: dict[str, Tensor], weight_name: str) -> dict[str, Tensor]:
    """Take the adapter of one linear layer out, under PEFT's names; empty where it has none."""
    module = weight_name.removesuffix("weight")
    names = {
        "lora_a.weight": "lora_A.weight",  # [r, d_in]
        "lora_b.weight": "lora_B.weight",  # [d_out, r]
        "magnitude": "lora_magnitude_vector",  # [d_out]
    }
    return {
        peft: adapter.pop(module + tune) for tune, peft in names.items() if module + tune in adapter
    }


def _fuse_lora(layers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One adapter of stacked layers from theirs; a layer without one gets rows of zeros in B."""
    present = [layer for layer in layers if layer]
    no_change = present[0]["lora_B.weight"].new_zeros(len(present[0]["lora_B.weight"]), 0)
    fused = {
        "lora_A.weight": torch.cat([layer["lora_A.weight"] for layer in present]),
        "lora_B.weight": torch.block_diag(
            *(layer["lora_B.weight"] if layer else no_change for layer in layers)
        ),
    }
    if "lora_magnitude_vector" in present[0]:
        if len(present) < len(layers):
            raise ValueError(
                f"DoRA of the vision attention covers {len(present)} of q_proj, k_proj, v_proj, "
                f"which are one layer in the HF model: give all three, or save merged weights"
            )
        fused["lora_magnitude_vector"] = torch.cat(
            [layer["lora_magnitude_vector"] for layer in present]
        )
    return fused
