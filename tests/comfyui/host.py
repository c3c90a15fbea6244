"""A small stand-in of ComfyUI: its folders, its memory and its progress bar."""

import types
from pathlib import Path

import torch


class Cancelled(Exception):
    """What ComfyUI raises in a node that the user has cancelled."""


class Host:
    """A ComfyUI below one folder.

    Attributes:
        encoders: its folders text_encoders
        inputs: its input folder
        outputs: its output folder
        package: its own package `comfy`
        loaded: models that were moved to their device, in this order
        bars: total and values of each progress bar
        cancel_at: value of a progress bar at which the user cancels
    """

    def __init__(self, root: Path) -> None:
        self.encoders = [root / "models/text_encoders", root / "models/clip"]
        self.inputs, self.outputs = root / "input", root / "output"
        self.package = root / "comfy"
        for folder in (*self.encoders, self.inputs, self.outputs, self.package):
            folder.mkdir(parents=True)
        self.loaded: list[torch.nn.Module] = []
        self.bars: list[tuple[int, list[int]]] = []
        self.cancel_at: int | None = None

    def modules(self) -> dict[str, types.ModuleType]:
        """Modules that stand for its own, by name."""
        return {
            "folder_paths": _module("folder_paths", **self._folder_paths()),
            "comfy": _module("comfy"),
            "comfy.model_management": _module("model_management", **self._model_management()),
            "comfy.model_patcher": _module("model_patcher", ModelPatcher=Patcher),
            "comfy.utils": _module("utils", ProgressBar=self._progress_bar),
        }

    def _folder_paths(self):
        def names(kind):
            assert kind == "text_encoders"
            found = (path for root in self.encoders for path in root.rglob("*"))
            return sorted(_below(path, self.encoders) for path in found if path.suffix in LISTED)

        def annotated(name):
            stem = name.removesuffix(" [output]")
            return str((self.outputs if stem != name else self.inputs) / stem)

        def save_path(prefix, folder):
            parent, name = (Path(folder) / prefix).parent, Path(prefix).name
            parent.mkdir(parents=True, exist_ok=True)
            return str(parent), name, len(list(parent.glob(f"{name}_*"))) + 1, "", prefix

        return {
            "get_filename_list": names,
            "get_folder_paths": lambda kind: [str(folder) for folder in self.encoders],
            "get_input_directory": lambda: str(self.inputs),
            "get_output_directory": lambda: str(self.outputs),
            "get_annotated_filepath": annotated,
            "get_save_image_path": save_path,
        }

    def _model_management(self):
        def load(patchers, *, force_full_load=False):
            assert force_full_load, "a model of torch's own layers cannot be loaded in parts"
            self.loaded += [patcher.model for patcher in patchers]

        def check():
            if self.bars and self.cancel_at is not None and self.bars[-1][1][-1] >= self.cancel_at:
                raise Cancelled

        return {
            "__file__": str(self.package / "model_management.py"),
            "text_encoder_device": lambda: torch.device("cpu"),
            "text_encoder_offload_device": lambda: torch.device("cpu"),
            "intermediate_device": lambda: torch.device("cpu"),
            "load_models_gpu": load,
            "throw_exception_if_processing_interrupted": check,
        }

    def _progress_bar(self, total):
        values = [0]
        self.bars.append((total, values))
        return types.SimpleNamespace(update_absolute=values.append)


LISTED = (".safetensors", ".pt", ".bin")


class Patcher:
    """What ComfyUI moves a model by."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device


def _module(name, **attributes):
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


def _below(path, roots):
    return str(next(path.relative_to(root) for root in roots if path.is_relative_to(root)))
