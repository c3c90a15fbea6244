"""Which files and folders below a folder are text encoders."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from torchtune_qwen25vl.conditioning._load import build, open_file, size_of

SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True)
class TextEncoderFile:
    """A candidate, as `load_text_encoder` takes it.

    Attributes:
        path: file or folder
        size: 3B, 7B, 32B, 72B or other; empty where it cannot be told
        form: folder, bf16, fp8, fp8 scaled, GGUF Q4_K and so on; likewise
        has_output: whether it can answer as well
        problem: why it cannot be loaded; empty where it can
    """

    path: Path
    size: str = ""
    form: str = ""
    has_output: bool = False
    problem: str = ""


def find_text_encoders(folder: str | os.PathLike[str]) -> list[TextEncoderFile]:
    """List what is, or may be taken for, a text encoder below a folder; only headers are read.

    Raises:
        ValueError: if there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"text encoders are looked for in a folder, {root} is none")
    folders = [path.parent for path in sorted(root.rglob("config.json")) if _is_ours(path)]
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
        if "mmproj" not in path.name.lower() and path.parent not in folders
    ]
    return [TextEncoderFile(path, form="folder", has_output=True) for path in folders] + [
        _described(path) for path in files
    ]


def _is_ours(config: Path) -> bool:
    try:
        return json.loads(config.read_text("utf-8")).get("model_type") == "qwen2_5_vl"
    except (ValueError, AttributeError):
        return False


def _described(path: Path) -> TextEncoderFile:
    try:
        weights = open_file(path)
        size = size_of(weights)
        if size != "other":
            build(weights)
    except ValueError as error:
        return TextEncoderFile(path, problem=str(error))
    return TextEncoderFile(path, size, weights.form, weights.has_head or size == "3B")
