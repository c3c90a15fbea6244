"""What a file of a text encoder holds, by its header, and its weights one at a time."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchtune_qwen25vl.weights import hf_weight_to_tune, on_disk_names

HEAD = "output.weight"
ADAPTERS = (".lora_", "lora_A", "lora_B", "lora_down", "lora_up", "lokr_", "hada_", "oft_")
VISION = "vision."
PIECE = 1 << 18  # numbers of a weight that are fp32 at once, which a cache holds


@dataclass(frozen=True)
class Scaled:
    """A weight in fp8 and what it is to be multiplied with.

    Attributes:
        weight: fp8, [out, in] or of any other shape
        scale: fp32, one number, or one for each row
    """

    weight: Tensor
    scale: Tensor

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the weight itself; the product is fp32, rounded once, a piece at a time."""
        rows = self.weight.flatten(1)  # [out, any]
        scales = self.scale.flatten()[:, None].expand(len(rows), 1)
        plain = torch.empty_like(rows, dtype=dtype)
        for piece in range(0, len(rows), step := max(1, PIECE // rows.shape[1])):
            part = slice(piece, piece + step)
            plain[part] = rows[part].float().mul_(scales[part])
        return plain.view_as(self.weight)


@dataclass(frozen=True)
class EncoderWeights:
    """The weights of a text encoder, in tune layout.

    Attributes:
        path: the file
        form: how it holds numbers, such as "bf16", "fp8 scaled" or "GGUF Q4_K"
        shapes: shape of each weight
        reader: yields each weight once, fp8 ones with their scales
        config: what the file itself says of its sizes, as config.json would; None for nothing
    """

    path: Path
    form: str
    shapes: Mapping[str, tuple[int, ...]]
    reader: Callable[[], Iterator[tuple[str, Tensor | Scaled]]]
    config: Mapping[str, object] | None = None

    @property
    def has_vision(self) -> bool:
        """Whether there is a vision tower."""
        return any(name.startswith(VISION) for name in self.shapes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds what the file holds: bf16, or fp32 where a part is finer."""
        is_finer = {"fp16", "fp32"} & set(self.form.split("/"))
        return torch.float32 if is_finer else torch.bfloat16

    @property
    def has_head(self) -> bool:
        """Whether there is an output layer."""
        return HEAD in self.shapes

    @property
    def width(self) -> int:
        """Width of the decoder."""
        return self.shapes["tok_embeddings.weight"][1]

    def __or__(self, other: "EncoderWeights") -> "EncoderWeights":
        """Put a vision tower beside a decoder."""

        def reader() -> Iterator[tuple[str, Tensor | Scaled]]:
            yield from self.reader()
            yield from other.reader()

        config = {**(self.config or {}), **(other.config or {})}
        return EncoderWeights(
            self.path, self.form, {**self.shapes, **other.shapes}, reader, config or None
        )


def refuse_other_files(path: Path, names: Collection[str]) -> None:
    """Refuse a file that is no text encoder, by what its names say it is.

    Raises:
        ValueError: saying what it is.
    """
    if any(part in name for name in names for part in ADAPTERS):
        raise ValueError(
            f"{path} is an adapter (LoRA), not a text encoder: name the model that it belongs to"
        )
    if not any(name.endswith("embed_tokens.weight") for name in names):
        few = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"{path} is no Qwen2.5-VL: it has no model.embed_tokens.weight, but {few or 'nothing'}"
        )


def tune_names(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Tensor]]:
    """Return what each key of an HF layout is in tune layout, on the meta device.

    Raises:
        ValueError: if a key is no weight of a Qwen2.5-VL.
    """
    found, unknown = {}, []
    for key, name in on_disk_names(shapes).items():
        try:
            found[key] = hf_weight_to_tune(name, torch.empty(shapes[key], device="meta"))
        except (KeyError, ValueError):
            unknown.append(key)
    if unknown:
        few = ", ".join(sorted(unknown)[:4])
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that no Qwen2.5-VL has ({few}): is it another "
            "model's file?"
        )
    return found
