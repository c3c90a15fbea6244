"""Adapters in PEFT's form: its tensors, its config, its two files.

Shapes: e vision width, d_out and d_in of a linear layer, r rank of an adapter.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtune_qwen25vl.weights._names import IN_MEMORY, joined, listed, renamed, rows_of


def write_peft(
    folder: Path, adapter: Mapping[str, Tensor], *, rank: int, alpha: float, base_model: str
) -> None:
    """Write the two files of a PEFT adapter.

    Args:
        folder: where the files go
        adapter: trained weights, see `tune_to_peft`
        rank: rank of every LoRA layer
        alpha: scale of every LoRA layer
        base_model: folder or hub id of the model that the adapter is for

    Raises:
        ValueError: as `tune_to_peft`, before anything is written.
    """
    weights, config = tune_to_peft(adapter, rank=rank, alpha=alpha)
    config["base_model_name_or_path"] = base_model
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tune_to_peft(
    adapter: Mapping[str, Tensor], *, rank: int, alpha: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert trained weights to PEFT's tensors and its adapter config, for the HF model.

    LoRA and DoRA weights become `lora_A`, `lora_B` and `lora_magnitude_vector`. Those of the
    vision q, k and v become one adapter of the fused `qkv`: A is stacked [3r, e], B is
    block-diagonal [3e, 3r], and rank and alpha are tripled so that their ratio stays. Other
    weights, which were trained in full, go under `modules_to_save`.

    Args:
        adapter: weights in tune layout, `lora_a`, `lora_b` and `magnitude` after their layer
        rank: rank r of every LoRA layer
        alpha: scale of every LoRA layer, which adds alpha / rank * B @ A

    Raises:
        ValueError: if a weight has no place in the HF model, or DoRA covers only some of the vision
            q, k and v.
    """
    left = dict(adapter)
    weights: dict[str, Tensor] = {}
    targets, wider, saved = set(), {}, set()
    for row in rows_of(adapter, side="tune"):
        module, _, parameter = renamed(row.hf, IN_MEMORY).rpartition(".")
        if all(tune in left for tune in row.tune):
            parts = [left.pop(tune) for tune in row.tune]
            weights[f"base_model.model.{module}.{parameter}"] = joined(row, parts)
            saved.add(module)
        layers = [_pop_lora(left, tune) for tune in row.tune if parameter == "weight"]
        if any(layers):
            pattern = re.escape(renamed(row.pattern, IN_MEMORY).rpartition(".")[0])
            pattern = pattern.replace(re.escape("{}"), r"\d+")
            targets.add(pattern)
            lora = layers[0] if len(layers) == 1 else _fuse_lora(layers)
            if (present := sum(map(bool, layers))) > 1:
                wider[pattern] = present
            weights |= {f"base_model.model.{module}.{key}": part for key, part in lora.items()}
    if left or not targets:
        raise ValueError(
            f"an adapter holds LoRA weights of layers the HF model has; {len(left)} of "
            f"{len(adapter)} weights are none such ({listed(left)}): was the model built by a "
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


def _pop_lora(adapter: dict[str, Tensor], weight_name: str) -> dict[str, Tensor]:
    """Take out the adapter of one linear layer, named as in PEFT; empty if the layer has none."""
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
    """Join adapters of stacked layers to one; a layer without one has rows of zeros in B."""
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
