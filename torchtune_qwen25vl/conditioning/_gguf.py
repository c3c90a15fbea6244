"""GGUF files as llama.cpp's converter writes them: the decoder in one, the vision tower in another.

Numbers are dequantised by the `gguf` package. The kernel of the patch embedding lies in two halves,
one for each frame.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtune_qwen25vl.conditioning._weights import EncoderWeights, Scaled

ARCHITECTURES = ("qwen2vl", "qwen25vl")
PROJECTOR = "qwen2.5vl_merger"
HALVES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
PATCHES = "vision.patch_embed.proj.weight"
WINDOW = 112  # pixels; the files do not say

_STEMS = {
    "token_embd": "tok_embeddings",
    "output_norm": "norm",
    "output": "output",
    "v.post_ln": "vision.merger.norm",
    "mm.0": "vision.merger.w1",
    "mm.2": "vision.merger.w2",
}
_OF_LAYERS = {
    "attn_norm": "sa_norm",
    "ln1": "sa_norm",
    "attn_q": "attn.q_proj",
    "attn_k": "attn.k_proj",
    "attn_v": "attn.v_proj",
    "attn_output": "attn.output_proj",
    "attn_out": "attn.output_proj",
    "ffn_norm": "mlp_norm",
    "ln2": "mlp_norm",
    "ffn_gate": "mlp.w1",
    "ffn_down": "mlp.w2",
    "ffn_up": "mlp.w3",
}
_LAYER = re.compile(r"(v\.)?blk\.(\d+)\.(\w+)")
FUSED = "attn_qkv"


def open_gguf(path: Path, *, is_vision: bool = False) -> EncoderWeights:
    """Read the header of a GGUF file.

    Args:
        path: the file
        is_vision: whether it is to hold a vision tower (mmproj) and not a decoder

    Raises:
        ValueError: if the `gguf` package is missing, or the file is damaged, another model's, or in
            numbers that the package does not dequantise.
    """
    reader = _reader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    _check_kind(path, facts, is_vision)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name not in HALVES:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            meta = torch.empty(shape, device="meta")
            shapes |= {part: piece.shape for part, piece in _named(path, name, meta)}
    if any(half in tensors for half in HALVES):
        shapes[PATCHES] = _patches(path, tensors).shape
    config = _vision_config(facts) if is_vision else _text_config(facts)
    return EncoderWeights(
        path,
        f"GGUF {_main_type(reader.tensors)}",
        {name: tuple(shape) for name, shape in shapes.items()},
        lambda: _read(path, tensors),
        config,
    )


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ValueError(
            "GGUF files need the package gguf: pip install 'torchtune-qwen25vl[gguf]'"
        ) from error
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}): fetch it again") from error


def _check_kind(path: Path, facts: Mapping[str, Any], is_vision: bool) -> None:
    architecture = facts.get("general.architecture")
    wanted = ("clip",) if is_vision else ARCHITECTURES
    if architecture not in wanted:
        kind = "the vision tower (mmproj)" if is_vision else "the text encoder"
        raise ValueError(
            f"{kind} is of the architecture {' or '.join(wanted)}, {path} is {architecture!r}: "
            "name the other file"
        )
    projector = facts.get("clip.projector_type", facts.get("clip.vision.projector_type"))
    if is_vision and projector != PROJECTOR:
        raise ValueError(f"the projector is {PROJECTOR}, {path} has {projector!r}: another model's")


def _named(path: Path, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor under its name in tune layout, a fused one as three."""
    stem, _, kind = name.rpartition(".")
    found = _LAYER.fullmatch(stem)
    if found is None and stem in _STEMS:
        module = _STEMS[stem]
    elif found is not None and (found[3] in _OF_LAYERS or found[3] == FUSED):
        layer = f"{'vision.' if found[1] else ''}layers.{found[2]}"
        if found[3] == FUSED:
            for part, piece in zip("qkv", weight.chunk(3), strict=True):
                yield f"{layer}.attn.{part}_proj.{kind}", piece
            return
        module = f"{layer}.{_OF_LAYERS[found[3]]}"
    else:
        raise ValueError(f"{path} holds {name}, which no Qwen2.5-VL has: is it another model's?")
    is_norm = module.endswith("norm") and kind == "weight"
    yield f"{module}.scale" if is_norm else f"{module}.{kind}", weight


def _read(path: Path, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor | Scaled]]:
    for name, tensor in tensors.items():
        if name not in HALVES:
            yield from _named(path, name, _values(path, tensor))
    if any(half in tensors for half in HALVES):
        yield PATCHES, _patches(path, tensors)


def _values(path: Path, tensor: Any) -> Tensor:
    """Dequantise a tensor, to fp32 unless it is fp16."""
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(
            f"the package gguf does not dequantise {tensor.tensor_type.name}, in which {path} has "
            f"{tensor.name}: use another file"
        ) from error
    return torch.from_numpy(np.array(values)).view(*map(int, reversed(tensor.shape)))


def _patches(path: Path, tensors: Mapping[str, Any]) -> Tensor:
    """Join the halves of the kernel, [e, 3, h, w] each, to [e, 3 * 2 * h * w]."""
    if lost := [half for half in HALVES if half not in tensors]:
        raise ValueError(f"{path} lacks {lost[0]}, half of the patch embedding: fetch it again")
    halves = [_values(path, tensors[half]) for half in HALVES]
    return torch.stack(halves, dim=2).flatten(1)


def _main_type(tensors: Any) -> str:
    """Name the type that most of the numbers are in."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + tensor.n_elements
    return max(sizes, key=sizes.__getitem__)


def _text_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a file says of its decoder as config.json does."""
    own = {key.partition(".")[2]: value for key, value in facts.items()}
    sections = [int(n) for n in own["rope.dimension_sections"]][:3]
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": int(own["embedding_length"]),
        "intermediate_size": int(own["feed_forward_length"]),
        "num_hidden_layers": int(own["block_count"]),
        "num_attention_heads": int(own["attention.head_count"]),
        "num_key_value_heads": int(own["attention.head_count_kv"]),
        "rms_norm_eps": round(float(own["attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(own["rope.freq_base"]),
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "max_position_embeddings": int(own["context_length"]),
        "image_token_id": 151655,
        "video_token_id": 151656,
    }


def _vision_config(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write what a file says of its vision tower as config.json does."""
    own = {key.removeprefix("clip.vision."): value for key, value in facts.items()}
    depth, pattern = int(own["block_count"]), int(own["n_wa_pattern"])
    vision = {
        "depth": depth,
        "hidden_size": int(own["embedding_length"]),
        "intermediate_size": int(own["feed_forward_length"]),
        "num_heads": int(own["attention.head_count"]),
        "patch_size": int(own["patch_size"]),
        "out_hidden_size": int(own["projection_dim"]),
        "window_size": WINDOW,
        "fullatt_block_indexes": [k for k in range(depth) if (k + 1) % pattern == 0],
        "tokens_per_second": 2,
    }
    return {"vision_config": vision}
