"""Everything that is asked of ComfyUI, which is imported when it is asked: nodes run inside it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchtune_qwen25vl.conditioning import PromptEncoder

ENCODERS = "text_encoders"  # ComfyUI's name for its folders of them
SUFFIXES = (".safetensors", ".sft", ".gguf")
TOKENIZER = "text_encoders/qwen25_tokenizer"  # in ComfyUI's own package


class ManagedEncoder:
    """A text encoder whose model ComfyUI moves, as it does its own.

    Args:
        encoder: its model lies where `offload_device` says
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        from comfy import model_management, model_patcher

        self._encoder = encoder
        self.patcher = model_patcher.ModelPatcher(
            encoder.model,
            load_device=model_management.text_encoder_device(),
            offload_device=model_management.text_encoder_offload_device(),
        )

    def ready(self) -> PromptEncoder:
        """Have the model moved to its device, whole, other models leaving as far as needed."""
        from comfy import model_management

        model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self._encoder


def offload_device() -> torch.device:
    """Return where a text encoder waits."""
    from comfy import model_management

    return model_management.text_encoder_offload_device()


def output_device() -> torch.device:
    """Return where what passes between nodes lies."""
    from comfy import model_management

    return model_management.intermediate_device()


def text_encoders() -> list[str]:
    """List what may be a text encoder in ComfyUI's folders: folders first, then single files."""
    import folder_paths

    files = {name for name in folder_paths.get_filename_list(ENCODERS) if _is_weights(name)}
    folders = set()
    for root in _roots():
        for folder, _, names in os.walk(root, followlinks=True):
            place = Path(folder).relative_to(root)
            if place.parts and "config.json" in names and _is_ours(Path(folder, "config.json")):
                folders.add(str(place))
            files |= {str(place / name) for name in names if name.lower().endswith(".gguf")}
    singles = {
        name
        for name in files
        if str(Path(name).parent) not in folders and "mmproj" not in Path(name).name.lower()
    }
    return sorted(folders) + sorted(singles)


def text_encoder_path(name: str) -> Path:
    """Return where a text encoder of the list lies.

    Raises:
        ValueError: if it is gone.
    """
    roots = _roots()
    found = next((path for root in roots if (path := root / name).exists()), None)
    if found is None:
        raise ValueError(
            f"text encoders are looked for in {', '.join(map(str, roots))}, where {name} is not: "
            "refresh the lists and choose again"
        )
    return found


def bundled_tokenizer() -> Path:
    """Return the folder of Qwen's tokenizer that ComfyUI brings along."""
    from comfy import model_management

    return Path(model_management.__file__).parent / TOKENIZER


def progress(total: int) -> Callable[[int], None]:
    """Begin the progress bar of a node; return what sets it.

    What is returned ends the node, as ComfyUI would, if the user has cancelled it.
    """
    from comfy import model_management
    from comfy.utils import ProgressBar

    bar = ProgressBar(total)

    def set_progress(done: int) -> None:
        model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done)

    return set_progress


def output_file(prefix: str, suffix: str) -> Path:
    """Return the next free file of a prefix, which may have folders, in the output folder."""
    import folder_paths

    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_{suffix}"


def saved_files(suffix: str) -> list[str]:
    """List the files of a suffix in the input folder and, marked so, in the output folder."""
    import folder_paths

    def below(folder: str) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob(f"*{suffix}"))

    outputs = below(folder_paths.get_output_directory())
    return below(folder_paths.get_input_directory()) + [f"{name} [output]" for name in outputs]


def saved_file(name: str) -> Path:
    """Return where a file of that list lies."""
    import folder_paths

    return Path(folder_paths.get_annotated_filepath(name))


def _roots() -> list[Path]:
    import folder_paths

    return [Path(folder) for folder in folder_paths.get_folder_paths(ENCODERS)]


def _is_weights(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _is_ours(config: Path) -> bool:
    try:
        settings: Any = json.loads(config.read_text("utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(settings, dict) and settings.get("model_type") == "qwen2_5_vl"
