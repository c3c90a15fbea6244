"""Single .safetensors files: plain, in fp8, and in fp8 with scales in either form of ComfyUI.

With scales there is beside `LAYER.weight`, in fp8,

    old form   `LAYER.scale_weight`, and one tensor `scaled_fp8` for the file
    new form   `LAYER.weight_scale`, and `LAYER.comfy_quant`, JSON as bytes, or the file's metadata
               `_quantization_metadata`

and in both a scale of inputs, which is for products in fp8 and not read here.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchtune_qwen25vl.conditioning._weights import (
    EncoderWeights,
    Scaled,
    refuse_other_files,
    tune_names,
)
from torchtune_qwen25vl.weights import hf_weight_to_tune, on_disk_names

FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
FORMATS = ("float8_e4m3fn", "float8_e5m2")
MARKER, METADATA = "scaled_fp8", "_quantization_metadata"
SCALES, OF_INPUTS = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale")
NOTE = ".comfy_quant"


@dataclass
class _Header:
    """What the header of a file says, its tensors sorted by what they are for."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)  # key of a weight -> of its scale
    notes: list[str] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)  # layer -> format, by the metadata
    is_marked: bool = False

    @property
    def is_scaled(self) -> bool:
        return self.is_marked or bool(self.scales or self.notes or self.formats)


def open_single(path: Path) -> EncoderWeights:
    """Read the header of a single .safetensors file.

    Raises:
        ValueError: if it is cut short or damaged, no text encoder, or in numbers that are not read.
    """
    header = _read_header(path)
    refuse_other_files(path, header.shapes)
    names = tune_names(path, header.shapes)
    _check_numbers(path, header)
    shapes = {name: tuple(t.shape) for parts in names.values() for name, t in parts.items()}
    return EncoderWeights(path, _form(header), shapes, lambda: _read(path, header))


def _read_header(path: Path) -> _Header:
    header = _Header()
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(key)
                _sort(header, key, tuple(piece.get_shape()), piece.get_dtype())
            for key in header.notes:
                _check_format(path, key, json.loads(bytes(opened.get_tensor(key).tolist())))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error
    layers = json.loads(metadata.get(METADATA, "{}")).get("layers", {})
    for layer, note in layers.items():
        _check_format(path, layer, note)
        header.formats[layer] = note["format"]
    return header


def _sort(header: _Header, key: str, shape: tuple[int, ...], dtype: str) -> None:
    if key == MARKER:
        header.is_marked = True
    elif key.endswith(NOTE):
        header.notes.append(key)
    elif (ending := key[key.rfind(".") :]) in SCALES:
        header.scales[key.removesuffix(ending) + ".weight"] = key
    elif ending not in OF_INPUTS:
        header.shapes[key], header.dtypes[key] = shape, dtype


def _check_format(path: Path, key: str, note: Mapping[str, Any]) -> None:
    if note.get("format") not in FORMATS:
        raise ValueError(
            f"quantised weights are read in {' or '.join(FORMATS)}, {path} has "
            f"{note.get('format')!r} for {key.removesuffix(NOTE)}: use another file"
        )


def _check_numbers(path: Path, header: _Header) -> None:
    for key, dtype in header.dtypes.items():
        if dtype not in FP8 and dtype not in PLAIN:
            raise ValueError(
                f"weights are bf16, fp16, fp32 or fp8, {path} has {key} in {dtype}: use another "
                "file"
            )
    lost = [
        key
        for key, dtype in header.dtypes.items()
        if header.is_scaled and dtype in FP8 and key not in header.scales
        if not key.endswith("embed_tokens.weight")
    ]
    if lost:
        raise ValueError(
            f"{path} is fp8 with scales, but {len(lost)} layers have none "
            f"({', '.join(sorted(lost)[:4])}): fetch it again"
        )


def _form(header: _Header) -> str:
    if any(dtype in FP8 for dtype in header.dtypes.values()):
        return "fp8 scaled" if header.is_scaled else "fp8"
    return "/".join(sorted({PLAIN[dtype] for dtype in header.dtypes.values()}))


def _read(path: Path, header: _Header) -> Iterator[tuple[str, Tensor | Scaled]]:
    """Yield every weight in tune layout; those in fp8 with their scale, 1 where there is none."""
    names = on_disk_names(header.shapes)
    with safe_open(path, framework="pt", backend="pread") as opened:  # memory of their own
        for key, name in names.items():
            weight = opened.get_tensor(key)
            parts = hf_weight_to_tune(name, weight)
            if header.dtypes[key] not in FP8:
                yield from parts.items()
                continue
            scale = opened.get_tensor(header.scales[key]) if key in header.scales else torch.ones(1)
            scales = _split(scale.float().flatten(), len(weight), len(parts))
            for (part, values), own in zip(parts.items(), scales, strict=True):
                yield part, Scaled(values, own)


def _split(scale: Tensor, rows: int, parts: int) -> list[Tensor]:
    """Share out the scales of a fused weight: one for all, or those of the rows."""
    if len(scale) not in (1, rows):
        raise ValueError(
            f"a layer has one scale, or one for each of its {rows} rows, this one {len(scale)}: "
            "use another file"
        )
    return [scale] * parts if len(scale) == 1 else list(scale.chunk(parts))
