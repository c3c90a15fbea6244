"""Adapters in PEFT's form, merged into the weights of their base as these are read.

Shapes: d_out and d_in of a linear layer, r rank of an adapter.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchtune_qwen25vl._files import read_object
from torchtune_qwen25vl.weights._names import (
    EMBEDDING,
    HEAD,
    IN_MEMORY,
    listed,
    on_disk_names,
    renamed,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
NEUTRAL: dict[str, Any] = {  # the one value of what else changes the result
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
}


class Adapter:
    """An adapter of LoRA or DoRA, and the weights that were trained in full beside it.

    Args:
        folder: folder of adapter_config.json and adapter_model.safetensors

    Attributes:
        folder: the same
        base: folder or hub id of the model that it belongs to
        dtypes: dtypes of its weights

    Raises:
        ValueError: if a file is missing or damaged, or the config asks for what is not computed.
    """

    def __init__(self, folder: Path) -> None:
        config, path = read_object(folder / CONFIG), folder / WEIGHTS
        for name, neutral in NEUTRAL.items():
            if config.get(name, neutral) not in (neutral, None):
                raise ValueError(
                    f"{folder / CONFIG} says {name} = {config[name]!r}, but adapters are merged "
                    "that are plain LoRA or DoRA; merge this one by peft"
                )
        if not path.is_file():
            raise ValueError(f"{path} is missing: an adapter has its weights there")
        self.folder, self.base = folder, str(config.get("base_model_name_or_path") or "")
        if not self.base:
            raise ValueError(f"{folder / CONFIG} names no base_model_name_or_path: write it in")
        self._config = config
        weights = {k.removeprefix("base_model.model."): w for k, w in load_file(path).items()}
        names = on_disk_names(weights)
        self._weights = {names[key]: weight for key, weight in weights.items()}
        self.dtypes = {weight.dtype for weight in self._weights.values()}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse an adapter that is of another model.

        Args:
            shapes: shapes of the model's weights, by their names on disk

        Raises:
            ValueError: naming its weights that have no place there.
        """
        known = set(shapes) | ({HEAD} if EMBEDDING in self._weights else set())
        for name in shapes:
            stem = name.removesuffix("weight")
            known |= {stem + part for part in PARTS} if name.endswith("weight") else set()
        strange = set(self._weights) - known
        wrong = {n for n, shape in shapes.items() if not self._suits(n, shape)}
        if strange or wrong:
            raise ValueError(
                f"{self.folder} is an adapter of {self.base}, which has no place for "
                f"{len(strange | wrong)} of its weights ({listed(strange | wrong)}): name its base "
                "in adapter_config.json"
            )

    def _suits(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self._weights:
            return tuple(self._weights[name].shape) == shape
        if (parts := self._parts(name)) is None:
            return True
        a, b, _ = parts
        return (b.shape[0], a.shape[1]) == shape and a.shape[0] == b.shape[1]

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight of the base with what the adapter makes of it, in the adapter's dtype.

        Args:
            name: on disk
            weight: [d_out, d_in], or of any shape where the adapter leaves it
        """
        if name in self._weights:
            return self._weights[name]
        if (parts := self._parts(name)) is None:
            return weight
        a, b, magnitude = parts
        merged = weight.to(a.dtype) + (self._alpha(name) / a.shape[0]) * b @ a
        if magnitude is None:
            return merged
        return merged * (magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1)

    def _parts(self, name: str) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return A [r, d_in], B [d_out, r] and magnitudes [d_out] of a weight; None without any."""
        stem = name.removesuffix("weight")
        a, b, magnitude = (self._weights.get(stem + part) for part in PARTS)
        return None if a is None or b is None else (a, b, magnitude)

    def _alpha(self, name: str) -> float:
        """Return the scale of a layer, as PEFT finds it: by the first pattern that its end fits."""
        for pattern, alpha in (self._config.get("alpha_pattern") or {}).items():
            if re.match(
                rf"(?:.*\.)?(?:{pattern})$", renamed(name, IN_MEMORY).removesuffix(".weight")
            ):
                return float(alpha)
        return float(self._config["lora_alpha"])


def find_adapter(source: str | Path) -> Adapter | None:
    """Read the adapter in a folder, or beside its file; None where there is a model, or neither.

    Raises:
        ValueError: as `Adapter`.
    """
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    whole = {file for file in folder.glob("*.safetensors") if file.name != WEIGHTS}
    if path.is_file():
        whole &= {path}
    return Adapter(folder) if (folder / CONFIG).is_file() and not whole else None
