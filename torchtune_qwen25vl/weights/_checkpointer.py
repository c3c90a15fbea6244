"""Weights in and out of torchtune's recipes.

A run writes these files, and beside them a copy of the original's config, tokenizer and the rest:

    output_dir/epoch_0/model-00001-of-00002.safetensors   named as the original; adapters merged
    output_dir/epoch_0/recipe_state.pt                    to resume; not in the last folder of a run
    output_dir/epoch_0/adapter_model.pt                   to resume, where adapters were trained
    output_dir/epoch_0/adapter/                           the same for PEFT; in a folder of its own,
                                                          else transformers would apply it twice
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torchtune import training
from torchtune.training import FormattedCheckpointFiles
from torchtune.training.checkpointing._utils import safe_torch_load

from torchtune_qwen25vl._files import recover_folders, replacing_folder
from torchtune_qwen25vl.transform import write_pixel_limits
from torchtune_qwen25vl.weights._peft import write_peft
from torchtune_qwen25vl.weights._pretrained import Checkpoint
from torchtune_qwen25vl.weights._safetensors import (
    copy_settings,
    find_weights,
    write_dtype,
)

RECIPE_STATE, ADAPTER_STATE = "recipe_state.pt", "adapter_model.pt"
PARTS = (training.MODEL_KEY, training.ADAPTER_KEY, training.ADAPTER_CONFIG)


class Qwen25VLCheckpointer:
    """Reads and writes what a torchtune recipe trains, in the layout of the original checkpoint.

    Every folder appears whole or not at all. Resuming needs no change of `checkpoint_files`: the
    latest folder in `output_dir` is found, and its weights are read, or the original weights and
    its adapters if adapters were trained.

    Args:
        checkpoint_dir: folder or hub id of the original checkpoint
        output_dir: where the folders `epoch_N` (or `step_N`) are written
        checkpoint_files: names of the .safetensors files, or torchtune's `filename_format` and
            `max_filename`; by default those of the folder's index, else all there are
        model_type: ignored; torchtune's recipes ask for it in the YAML
        recipe_checkpoint: recipe state to resume from, relative to `output_dir`; by default that of
            the latest folder
        adapter_checkpoint: adapters to resume from, relative to `output_dir`; by default those
            beside the recipe state
        should_load_recipe_state: whether to resume; set by the recipe
        resume_from_checkpoint: whether to resume, in torchtune's older word
        min_pixels: fewest pixels of an image in training, for `preprocessor_config.json`; by
            default the original's value stays
        max_pixels: most pixels of an image in training, for the same file
        keep_last_n_checkpoints: how many folders to keep; all by default

    Raises:
        ValueError: if the files are not safetensors, not whole, or not exactly the weights that
            config.json asks for, or if there is nothing to resume from.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        output_dir: str,
        *,
        checkpoint_files: Sequence[str] | Mapping[str, str] | None = None,
        model_type: str | None = None,
        recipe_checkpoint: str | None = None,
        adapter_checkpoint: str | None = None,
        should_load_recipe_state: bool = False,
        resume_from_checkpoint: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        keep_last_n_checkpoints: int | None = None,
    ) -> None:
        self._output_dir = Path(output_dir)
        self._base_model = str(checkpoint_dir)
        self._checkpoint_dir, files = find_weights(checkpoint_dir)
        if isinstance(checkpoint_files, Mapping):
            names = FormattedCheckpointFiles.from_dict(dict(checkpoint_files))
            checkpoint_files = names.build_checkpoint_filenames()
        files = files if checkpoint_files is None else list(checkpoint_files)
        self._limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._keep = keep_last_n_checkpoints
        self._recipe_state: Path | None = None
        self._adapter_state: Path | None = None
        self._checkpoint = Checkpoint(self._checkpoint_dir, files, self._checkpoint_dir)
        self._source = self._checkpoint
        if should_load_recipe_state or resume_from_checkpoint:
            self._find_state(recipe_checkpoint, adapter_checkpoint)

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the model's state dict and, when resuming, the adapters and the recipe's state.

        The weights are mapped from their files, so that they cost memory only as they are used.
        """
        state: dict[str, Any] = {training.MODEL_KEY: dict(self._source.read(lazily=True))}
        if self._adapter_state is not None:
            state[training.ADAPTER_KEY] = safe_torch_load(self._adapter_state)
        if self._recipe_state is not None:
            state |= safe_torch_load(self._recipe_state, mmap=False)
        return state

    def save_checkpoint(
        self,
        state_dict: Mapping[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
        *,
        step: int | None = None,
        dir_prefix: Literal["epoch", "step"] = "epoch",
    ) -> None:
        """Write one folder: weights, adapters, and, while training goes on, the recipe's state.

        Args:
            state_dict: what to save, under torchtune's keys; adapters merged into the weights
            epoch: number in the folder's name
            intermediate_checkpoint: whether training goes on, so that the recipe's state is saved
            adapter_only: whether to leave the model's weights out
            step: number in the folder's name if `dir_prefix` is "step"
            dir_prefix: first half of the folder's name

        Raises:
            ValueError: if the weights are not exactly the original's by name and shape, or there is
                no adapter to save.
        """
        adapter = state_dict.get(training.ADAPTER_KEY)
        if adapter_only and adapter is None:
            raise ValueError("adapter_only saves adapters, and state_dict has none under 'adapter'")
        number = step if dir_prefix == "step" else epoch
        if number is None:
            raise ValueError("a folder step_N needs its number: pass step")
        target = self._output_dir / f"{dir_prefix}_{number}"
        with replacing_folder(target) as folder:
            copy_settings(self._checkpoint_dir, folder)
            write_pixel_limits(folder, **self._limits)
            if not adapter_only:
                self._checkpoint.write(folder, state_dict[training.MODEL_KEY])
                write_dtype(folder, state_dict[training.MODEL_KEY])
            if adapter is not None:
                torch.save(dict(adapter), folder / ADAPTER_STATE)
            if intermediate_checkpoint:
                recipe = {key: value for key, value in state_dict.items() if key not in PARTS}
                torch.save(recipe, folder / RECIPE_STATE)
        if adapter is not None:  # afterwards: what PEFT cannot hold must not cost the epoch
            config = state_dict[training.ADAPTER_CONFIG]
            scale = {"rank": config["r"], "alpha": config["lora_alpha"]}
            with replacing_folder(target / "adapter") as folder:
                write_peft(folder, adapter, **scale, base_model=self._base_model)
        if self._keep is not None:
            earlier = {n: path for n, path in _numbered(target.parent, dir_prefix) if n < number}
            for n in sorted(earlier)[: len(earlier) + 1 - self._keep]:
                shutil.rmtree(earlier[n])

    def _find_state(self, recipe: str | None, adapter: str | None) -> None:
        folder = (self._output_dir / recipe).parent if recipe else _latest(self._output_dir)
        self._recipe_state = self._output_dir / recipe if recipe else folder / RECIPE_STATE
        adapter_state = self._output_dir / adapter if adapter else folder / ADAPTER_STATE
        for path in (self._recipe_state, adapter_state):
            if not path.is_file() and (path == self._recipe_state or adapter):
                raise ValueError(
                    f"{path} is missing; a run that ended leaves no state in its last folder. To "
                    f"train on from its weights give it as checkpoint_dir; to repeat from an "
                    f"earlier folder give recipe_checkpoint, such as epoch_0/{RECIPE_STATE}"
                )
        if adapter_state.is_file():
            self._adapter_state = adapter_state
        else:
            self._source = Checkpoint(folder, None, self._checkpoint_dir)


def _numbered(output_dir: Path, prefix: str) -> list[tuple[int, Path]]:
    """List the folders `<prefix>_N` with their numbers."""
    matches = ((re.fullmatch(rf"{prefix}_(\d+)", path.name), path) for path in output_dir.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def _latest(output_dir: Path) -> Path:
    """Return the folder with the highest number."""
    found = []
    if output_dir.is_dir():
        recover_folders(output_dir)
        found = [folders for p in ("epoch", "step") if (folders := _numbered(output_dir, p))]
    if len(found) != 1:
        held = "both of" if found else "none of"
        raise ValueError(
            f"{output_dir} holds {held} epoch_N and step_N to resume from; name the one to use by "
            f"recipe_checkpoint, or run without resume_from_checkpoint first"
        )
    return max(found[0])[1]
