"""The node that loads a text encoder."""

from pathlib import Path
from typing import Any

import torch

from torchtune_qwen25vl.comfyui._host import (
    ManagedEncoder,
    bundled_tokenizer,
    offload_device,
    text_encoder_path,
    text_encoders,
)
from torchtune_qwen25vl.conditioning import load_text_encoder

ENCODER = "QWEN25VL"  # type of what passes from this node to the others
CATEGORY = "Qwen2.5-VL"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Loader:
    """Load Qwen-Image's text encoder: a folder, a single file, fp8 or GGUF."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    RETURN_TYPES = (ENCODER,)
    RETURN_NAMES = ("encoder",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        source = "A file or a folder in ComfyUI's folders text_encoders."
        tokenizer = (
            "Folder of Qwen's tokenizer. Empty: the one beside the weights, or else the one that "
            "ComfyUI brings along."
        )
        keep_fp8 = "Hold fp8 weights in fp8: half the memory, more time. For files in fp8 only."
        return {
            "required": {
                "source": (text_encoders(), {"tooltip": source}),
                "dtype": (list(DTYPES), {"tooltip": "The dtype that the model computes in."}),
            },
            "optional": {
                "tokenizer": ("STRING", {"default": "", "tooltip": tokenizer}),
                "keep_fp8": ("BOOLEAN", {"default": False, "tooltip": keep_fp8}),
            },
        }

    def load(
        self, source: str, dtype: str, tokenizer: str = "", keep_fp8: bool = False
    ) -> tuple[ManagedEncoder]:
        """Load it to where ComfyUI lets text encoders wait."""
        path = text_encoder_path(source)
        encoder = load_text_encoder(
            path,
            tokenizer=tokenizer.strip() or _default_tokenizer(path),
            dtype=DTYPES[dtype],
            device=offload_device(),
            keep_fp8=keep_fp8,
        )
        return (ManagedEncoder(encoder),)


def _default_tokenizer(path: Path) -> Path | None:
    """Return ComfyUI's tokenizer, or None where there is one beside the weights."""
    folder = path if path.is_dir() else path.parent
    near = folder, folder.parent / "tokenizer", folder.parent / "processor"
    names = "tokenizer.json", "vocab.json"
    if any((place / name).exists() for place in near for name in names):
        return None
    return bundled_tokenizer()
