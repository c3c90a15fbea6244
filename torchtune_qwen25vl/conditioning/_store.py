"""Embeddings in files: one safetensors file for each prompt.

diffusers   NAME.safetensors: prompt_embeds [1, l, d] and prompt_embeds_mask int64 [1, l], the
arguments of these names of the pipelines
musubi      NAME_qi_te.safetensors, of edits NAME_qie_te.safetensors: varlen_vl_embed_DTYPE
[l, d], the cache of musubi-tuner's trainer
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.conditioning._templates import Task

Layout = Literal["diffusers", "musubi"]
EMBEDS, MASK = "prompt_embeds", "prompt_embeds_mask"
MUSUBI_VERSION = "1.0.1"


class StoredEmbeds(NamedTuple):
    """What a file of the layout "diffusers" holds."""

    embeds: Tensor  # [1, l, d]
    mask: Tensor  # int64 [1, l]
    facts: dict[str, str]  # prompt, task, model and what else was written


def file_name(name: str, layout: Layout, task: Task) -> str:
    """Name the file of a prompt."""
    if layout == "diffusers":
        return f"{name}.safetensors"
    return f"{name}_{'qi' if task == 'text_to_image' else 'qie'}_te.safetensors"


def write_embeds(
    path: str | os.PathLike[str],
    embeds: Tensor,
    *,
    layout: Layout = "diffusers",
    facts: Mapping[str, str],
) -> None:
    """Write the embeddings of one prompt, whole or not at all.

    Args:
        path: of the file
        embeds: [l, d], without padding
        layout: of the file
        facts: what to know of it; "prompt" and "task" at least
    """
    embeds = embeds.detach().cpu().contiguous()
    if layout == "musubi":
        dtype = str(embeds.dtype).removeprefix("torch.")
        kind = "qwen_image" if facts["task"] == "text_to_image" else "qwen_image_edit"
        told = {"architecture": kind, "caption1": facts["prompt"], "format_version": MUSUBI_VERSION}
        content = save({f"varlen_vl_embed_{dtype}": embeds}, {**facts, **told})
    else:
        mask = torch.ones(1, len(embeds), dtype=torch.int64)
        content = save({EMBEDS: embeds[None], MASK: mask}, dict(facts))
    write_file(Path(path), content)


def read_embeds(path: str | os.PathLike[str]) -> StoredEmbeds:
    """Read what `write_embeds` wrote in the layout of diffusers.

    Raises:
        ValueError: if the file is damaged or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if not {EMBEDS, MASK} <= set(file.keys()):
                names = ", ".join(sorted(file.keys())[:4])
                raise ValueError(
                    f"{path} holds no prompt_embeds and prompt_embeds_mask, but {names}: is it a "
                    "file of another layout?"
                )
            return StoredEmbeds(
                file.get_tensor(EMBEDS), file.get_tensor(MASK), dict(file.metadata() or {})
            )
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): write it again") from error
