"""The nodes that keep conditionings in files, one in each.

    prompt_embeds        float [1, l, d]
    prompt_embeds_mask   int64 [1, l], 1 where there is a token
    reference_latents.N  latents of the reference images, in their order

The first two are what `prompt_embeds=` and `prompt_embeds_mask=` of diffusers' pipelines take.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.comfyui._conditioning import (
    LATENTS,
    Conditioning,
    Entry,
    entries,
    make_conditioning,
)
from torchtune_qwen25vl.comfyui._host import output_file, saved_file, saved_files
from torchtune_qwen25vl.comfyui._loader import CATEGORY

EMBEDS, EMBEDS_MASK = "prompt_embeds", "prompt_embeds_mask"
SUFFIX = ".safetensors"


class SaveConditioning:
    """Save a conditioning, so that it can be used again without the encoder."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        prefix = "Name of the file in the output folder; may have folders."
        note = "Any text, kept in the file: the prompt, for example."
        return {
            "required": {
                "conditioning": ("CONDITIONING",),
                "filename_prefix": (
                    "STRING",
                    {"default": "conditioning/qwen", "tooltip": prefix},
                ),
            },
            "optional": {"note": ("STRING", {"default": "", "tooltip": note})},
        }

    def save(
        self, conditioning: Conditioning, filename_prefix: str, note: str = ""
    ) -> dict[str, Any]:
        """Write the file, whole or not at all."""
        entry = _only(conditioning)
        path = output_file(filename_prefix, SUFFIX)
        tensors = {EMBEDS: entry.embeds, EMBEDS_MASK: entry.mask.to(torch.int64)}
        tensors |= {f"{LATENTS}.{i}": latent for i, latent in enumerate(entry.latents)}
        metadata = {"torchtune_qwen25vl": version("torchtune-qwen25vl"), "note": note}
        content = save({name: t.contiguous() for name, t in tensors.items()}, metadata)
        write_file(path, content)
        return {"ui": {"text": [f"saved to {path}"]}}


class LoadConditioning:
    """Load a conditioning that was saved."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        return {"required": {"file": (saved_files(SUFFIX),)}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        """Tell one state of the file from another."""
        state = saved_file(file).stat()
        return f"{state.st_mtime_ns} {state.st_size}"

    def load(self, file: str) -> tuple[Conditioning]:
        """Read the file."""
        return (make_conditioning(*_read(saved_file(file))),)


def _only(conditioning: Conditioning) -> Entry:
    """Return the only entry, all of which a file can hold.

    Raises:
        ValueError: if there are several, or it has more than a file holds.
    """
    found = entries(conditioning)
    if len(found) != 1:
        raise ValueError(
            f"a file holds one conditioning, got {len(found)} that are combined: save each before "
            "they are"
        )
    entry = found[0]
    if entry.others or len(entry.embeds) != 1:
        held = ", ".join(entry.others) or f"a batch of {len(entry.embeds)}"
        raise ValueError(
            "a file holds embeddings of one prompt, their mask and reference latents, this "
            f"conditioning has {held}: save it before the node that adds that"
        )
    return entry


def _read(path: Path) -> tuple[Tensor, Tensor, list[Tensor]]:
    try:
        tensors = _tensors_of(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): save it again") from error
    embeds = tensors.pop(EMBEDS)
    mask = tensors.pop(EMBEDS_MASK, torch.ones(embeds.shape[:2], dtype=torch.int64))
    latents = [tensors.pop(f"{LATENTS}.{i}") for i in range(_latents_of(tensors))]
    if tensors or mask.shape != embeds.shape[:2]:
        wrong = ", ".join(sorted(tensors)) or f"a mask {list(mask.shape)} of {list(embeds.shape)}"
        raise ValueError(f"{path} holds what no conditioning does ({wrong}): choose another file")
    return embeds, mask, latents


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """Read all tensors, if there are embeddings among them: other files may be large.

    Raises:
        ValueError: if there are none.
    """
    with safe_open(path, framework="pt") as opened:
        names = list(opened.keys())
        shape = opened.get_slice(EMBEDS).get_shape() if EMBEDS in names else []
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(
                f"a conditioning has {EMBEDS} [1, tokens, width], {path} has {shape or 'none'}: "
                "choose a file of Save Conditioning or of embed_prompts"
            )
        return {name: opened.get_tensor(name) for name in names}


def _latents_of(tensors: dict[str, Tensor]) -> int:
    """Count the reference latents, numbered from 0."""
    return next(i for i in range(len(tensors) + 1) if f"{LATENTS}.{i}" not in tensors)
