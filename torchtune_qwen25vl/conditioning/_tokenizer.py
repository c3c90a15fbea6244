"""The tokenizer and the pixel limits of a text encoder, from where people have them."""

import os
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.transform import Qwen25VLTransform, read_processor
from torchtune_qwen25vl.weights import fetch

LIMITS: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 12845056}  # of every published one
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
WEIGHTS = ["*.safetensors"]


def make_transform(tokenizer: str | os.PathLike[str] | None, folder: Path) -> Qwen25VLTransform:
    """Make the transform of weights that lie in a folder.

    Args:
        tokenizer: folder, tokenizer.json or hub id; by default the folder of the weights, or the
            folders `tokenizer` and `processor` beside it, as diffusers' pipelines have them
        folder: of the weights

    Raises:
        ValueError: if there is no tokenizer, or it is another model's.
    """
    near = [folder, folder.parent / "tokenizer", folder.parent / "processor"]
    if tokenizer is not None:
        given = fetch(tokenizer, without=WEIGHTS)
        near = [given.parent if given.is_file() else given, *near[1:], folder]
    files = next(filter(None, map(_files, near if tokenizer is None else near[:1])), None)
    if files is None:
        raise ValueError(
            "a text encoder needs Qwen's tokenizer (tokenizer.json, or vocab.json and merges.txt), "
            f"there is none in {tokenizer or folder}: pass tokenizer, a folder or the hub id "
            "Qwen/Qwen2.5-VL-7B-Instruct"
        )
    processors = [place for place in near if any((place / name).exists() for name in PROCESSORS)]
    settings = read_processor(processors[0]) if processors else LIMITS
    return Qwen25VLTransform(*files, **settings)


def _files(folder: Path) -> tuple[Path, ...] | None:
    """Return the files of a tokenizer in a folder."""
    if (whole := folder / "tokenizer.json").exists():
        return (whole,)
    parts = folder / "vocab.json", folder / "merges.txt"
    return parts if all(part.exists() for part in parts) else None
