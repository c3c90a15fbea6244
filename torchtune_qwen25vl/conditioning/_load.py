"""Text encoders from whatever people have: folders, single files, GGUF."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchtune_qwen25vl.conditioning._encoder import PromptEncoder
from torchtune_qwen25vl.conditioning._fp8 import hold_fp8
from torchtune_qwen25vl.conditioning._gguf import open_gguf
from torchtune_qwen25vl.conditioning._single import open_single
from torchtune_qwen25vl.conditioning._tokenizer import make_transform
from torchtune_qwen25vl.conditioning._weights import HEAD, EncoderWeights, Scaled
from torchtune_qwen25vl.model import (
    Qwen25VL,
    qwen2_5_vl_3b,
    qwen2_5_vl_7b,
    qwen2_5_vl_32b,
    qwen2_5_vl_72b,
    qwen2_5_vl_from_config,
)
from torchtune_qwen25vl.weights import (
    PICKLES,
    Checkpoint,
    fetch,
    materialize,
    refuse_mismatch,
)

Config = str | os.PathLike[str] | Mapping[str, Any]
BUILDERS = {  # width of the decoder -> name and builder
    2048: ("3B", qwen2_5_vl_3b),
    3584: ("7B", qwen2_5_vl_7b),
    5120: ("32B", qwen2_5_vl_32b),
    8192: ("72B", qwen2_5_vl_72b),
}
TIED = "3B"
EMBEDDING = "tok_embeddings.weight"


class NoOutput(nn.Module):
    """Stands for the output layer of weights that have none.

    Args:
        path: the file
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        """Refuse.

        Raises:
            ValueError: in any case.
        """
        raise ValueError(
            f"{self.path} has no output layer (lm_head): it embeds prompts, and cannot answer or "
            "caption; load the whole checkpoint for that"
        )


def load_text_encoder(
    source: str | os.PathLike[str],
    *,
    config: Config | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    keep_fp8: bool = False,
) -> PromptEncoder:
    """Load Qwen-Image's text encoder.

    Memory peaks at the size of the weights plus a few of the largest.

    Args:
        source: folder of a Qwen2.5-VL or of a diffusers pipeline; hub id of either; a single
            .safetensors file with the names of the hub (ComfyUI) or of transformers 5 (DiffSynth),
            plain, in fp8, or in fp8 with scales in either form; or a .gguf file
        config: config.json of a single file, its folder or what it holds; for sizes that Qwen has
            not published by default the one beside it
        tokenizer: folder, tokenizer.json or hub id; by default beside the weights
        mmproj: the .gguf file of the vision tower; by default the one beside a .gguf file whose
            name contains "mmproj"
        dtype: dtype that the model computes in
        device: where it goes
        keep_fp8: hold weights that are fp8 in fp8, with their scales, and dequantise a layer when
            it computes: half the memory, more time

    Raises:
        ValueError: if the files are damaged, another model's, an adapter or without a vision tower,
            lack weights or have others, or if there is no tokenizer.
    """
    path = fetch(source)
    if path.suffix in PICKLES:
        raise ValueError(
            f"weights are .safetensors or .gguf, {path} is pickled, and reading it can run code: "
            "convert it first"
        )
    if path.is_dir():
        refuse_for_folders(config=config, mmproj=mmproj, keep_fp8=keep_fp8)
        return _load_folder(path, tokenizer, dtype, device)
    if not path.is_file():
        raise ValueError(f"{source} is neither a file nor a folder nor a hub id (owner/name)")
    weights = open_file(path, mmproj)
    if keep_fp8 and not weights.form.startswith("fp8"):
        raise ValueError(f"keep_fp8 is for weights in fp8, {path} is {weights.form}: leave it out")
    transform = make_transform(tokenizer, path.parent)
    model = build(weights, config)
    _fill(model, weights, dtype, device, keep_fp8=keep_fp8)
    return PromptEncoder(model.eval(), transform)


def open_file(path: Path, mmproj: str | os.PathLike[str] | None = None) -> EncoderWeights:
    """Read the header of a single file, and of the vision tower that a .gguf file has beside it.

    Raises:
        ValueError: if it cannot be read, or there is no vision tower.
    """
    if path.suffix.lower() == ".gguf":
        weights = open_gguf(path)
        for tower in files_of(path, mmproj)[1:]:
            weights |= open_gguf(tower, is_vision=True)
    elif mmproj is not None:
        raise ValueError(f"mmproj belongs to a .gguf file, got it with {path}: leave it out")
    else:
        weights = open_single(path)
    if not weights.has_vision:
        remedy = "name its mmproj file" if path.suffix.lower() == ".gguf" else "use a whole file"
        raise ValueError(
            f"{path} has no vision tower, without which images cannot be edited: {remedy}"
        )
    return weights


def files_of(path: Path, mmproj: str | os.PathLike[str] | None = None) -> list[Path]:
    """Return a single file, and the vision tower of a .gguf file behind it, if it has one.

    Raises:
        ValueError: as `find_mmproj`.
    """
    if path.suffix.lower() != ".gguf":
        return [path]
    tower = Path(mmproj) if mmproj is not None else find_mmproj(path)
    return [path] if tower is None else [path, tower]


def find_mmproj(path: Path) -> Path | None:
    """Return the vision tower beside a .gguf file: the only one, or the one of its model's name.

    Raises:
        ValueError: if there are several, and none of them is named for the file.
    """
    found = sorted(p for p in path.parent.glob("*.gguf") if "mmproj" in p.name.lower())
    if len(found) > 1:
        stem = path.stem.rsplit("-", 1)[0].lower()
        found = [p for p in found if stem in p.name.lower()] or found
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{path} has several vision towers beside it ({names}): choose by mmproj")
    return found[0] if found else None


def size_of(weights: EncoderWeights) -> str:
    """Name the size: 3B, 7B, 32B, 72B or other."""
    return BUILDERS[weights.width][0] if weights.width in BUILDERS else "other"


def build(weights: EncoderWeights, config: Config | None = None) -> Qwen25VL:
    """Build the model of a file on the meta device, and hold its names and shapes against it.

    Raises:
        ValueError: if its size is unknown, or it has not exactly the model's weights.
    """
    with torch.device("meta"):
        model = _of_size(weights, config)
        if not weights.has_head and HEAD in model.state_dict():
            model.output = NoOutput(weights.path)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = dict(weights.shapes)
    if HEAD not in wanted:  # saved beside the embedding that it is tied to, see `_refuse_untied`
        found.pop(HEAD, None)
    refuse_mismatch(wanted, found)
    return model


def _of_size(weights: EncoderWeights, config: Config | None) -> Qwen25VL:
    if config is not None:
        return qwen2_5_vl_from_config(config if isinstance(config, Mapping) else Path(config))
    if weights.config is not None:
        own = {"vocab_size": weights.shapes[EMBEDDING][0]}
        own["tie_word_embeddings"] = not weights.has_head and size_of(weights) in (TIED, "other")
        return qwen2_5_vl_from_config({**weights.config, **own})
    beside = weights.path.with_name("config.json")
    if weights.width not in BUILDERS and beside.is_file():
        return qwen2_5_vl_from_config(beside)
    if weights.width not in BUILDERS:
        known = ", ".join(f"{width} ({name})" for width, (name, _) in BUILDERS.items())
        raise ValueError(
            f"the size of a single file is told from its width, {known}; {weights.path} is "
            f"{weights.width} wide: pass config"
        )
    return BUILDERS[weights.width][1]()


def _fill(
    model: Qwen25VL,
    weights: EncoderWeights,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    keep_fp8: bool,
) -> None:
    """Give a model its weights, one at a time."""

    def read() -> Iterator[tuple[str, Tensor]]:
        tied: dict[str, Tensor] = {}
        for name, value in weights.reader():
            if isinstance(value, Scaled):
                if keep_fp8 and hold_fp8(model, name, value, device):
                    continue
                value = value.plain(dtype)
            if name in (EMBEDDING, HEAD) and weights.has_head and HEAD not in wanted:
                tied[name] = value
            if name in wanted:
                yield name, value.to(dtype)
        _refuse_untied(weights.path, tied)

    wanted = model.state_dict().keys()
    state = {name: weight.to(device) for name, weight in read()}  # layers in fp8 are exchanged
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in state}
    materialize(model, [*state.items(), *held.items()], device=device)


def _refuse_untied(path: Path, tied: Mapping[str, Tensor]) -> None:
    if len(tied) == 2 and not torch.equal(tied[EMBEDDING], tied[HEAD]):
        raise ValueError(
            f"the output layer of a 3B is its embedding, {path} holds both with different values: "
            "pass a config with tie_word_embeddings false"
        )


def _load_folder(
    path: Path,
    tokenizer: str | os.PathLike[str] | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> PromptEncoder:
    folder = path / "text_encoder" if (path / "model_index.json").exists() else path
    checkpoint = Checkpoint(folder, None, folder)
    transform = make_transform(tokenizer, folder)
    materialize(checkpoint.model, checkpoint.read(lazily=False), device=device, dtype=dtype)
    return PromptEncoder(checkpoint.model.eval(), transform)


def refuse_for_folders(**options: Any) -> None:
    """Refuse options that are for single files.

    Raises:
        ValueError: if one is given.
    """
    if given := [name for name, value in options.items() if value]:
        raise ValueError(
            f"{', '.join(given)} is for single files, a folder has its own: leave it out"
        )
