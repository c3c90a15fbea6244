"""A checkpoint beside the model it fills, and `load_pretrained`.

The model that config.json describes is built on the meta device. Names, shapes and dtypes in the
headers of the files are checked against it before a single weight is read.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchtune_qwen25vl.model import Qwen25VL, qwen2_5_vl_from_config
from torchtune_qwen25vl.transform import Qwen25VLTransform
from torchtune_qwen25vl.weights._adapter import Adapter
from torchtune_qwen25vl.weights._materialize import materialize
from torchtune_qwen25vl.weights._names import (
    EMBEDDING,
    HEAD,
    hf_weight_to_tune,
    on_disk_names,
    refuse_mismatch,
    tune_to_hf,
)
from torchtune_qwen25vl.weights._safetensors import find_weights, open_weights, write_weights


class Checkpoint:
    """A checkpoint's files beside the model they fill: every header is checked, no weight read.

    Args:
        folder: where the files lie
        files: names of the files; by default as in `open_weights`
        settings: folder of config.json
        adapter: is merged into the weights as they are read

    Raises:
        ValueError: if the files are not whole, or not exactly the weights that config.json asks
            for, or the adapter is another model's.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[str] | None,
        settings: Path,
        adapter: Adapter | None = None,
    ) -> None:
        self.files, self._adapter = open_weights(folder, files), adapter
        if not (config := settings / "config.json").is_file():
            raise ValueError(
                f"{config} is missing: the folder of the weights has no settings, name one that has"
            )
        with torch.device("meta"):
            self.model = qwen2_5_vl_from_config(config)
        self._shapes = _shapes(tune_to_hf(self.model.state_dict()))
        self._names = on_disk_names(self.files.file_of)
        found = {self._names[key]: shape for key, shape in self.files.shape_of.items()}
        if HEAD in found and HEAD not in self._shapes:
            self._refuse_untied_head()
            del found[HEAD]
        refuse_mismatch(self._shapes, found)
        if adapter is not None:
            adapter.check(self._shapes)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes that occur, those of the adapter too."""
        return self.files.dtypes | (self._adapter.dtypes if self._adapter else set())

    def read(self, *, lazily: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield every weight in tune layout, one at a time, on the CPU.

        Args:
            lazily: map the files into memory, as in `WeightFiles.read`; if not, every weight has
                memory of its own
        """
        for key, weight in self.files.read(lazily=lazily):
            if (known := self._names[key]) in self._shapes:
                if self._adapter is not None:
                    weight = self._adapter.merged(known, weight)
                for name, part in hf_weight_to_tune(known, weight).items():
                    yield name, part if lazily else _own(part)

    def write(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write weights in tune layout, of the same names and shapes, to files named as these."""
        hf_weights = tune_to_hf(weights)
        refuse_mismatch(self._shapes, _shapes(hf_weights))
        files = {self._names[key]: file for key, file in self.files.file_of.items()}
        write_weights(folder, hf_weights, {name: files[name] for name in hf_weights})

    def _refuse_untied_head(self) -> None:
        """Refuse a tied head that some tool saved as well, if it differs from the embedding."""
        weights = {self._names[key]: weight for key, weight in self.files.read(lazily=True)}
        embedding = weights.get(EMBEDDING)
        if embedding is not None and not _equal(weights[HEAD], embedding):
            raise ValueError(
                f"config.json ties {HEAD} to {EMBEDDING}, and {self.files.folder} holds both with "
                f"different values: set tie_word_embeddings to false, or remove {HEAD}"
            )


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    settings_dir: str | os.PathLike[str] | None = None,
    adapter: Adapter | None = None,
) -> tuple[Qwen25VL, Qwen25VLTransform]:
    """Load a model with its weights, ready for inference, and the transform that makes its input.

    Memory peaks at the size of the weights plus the largest of them.

    Args:
        source: folder, .safetensors file or hub id (`owner/name`)
        dtype: dtype of the weights; by default that of the files
        device: where the model goes
        settings_dir: folder of config.json, tokenizer and preprocessor_config.json, for weights
            that lie elsewhere
        adapter: is merged into the weights

    Raises:
        ValueError: if the files are not safetensors, not whole, not exactly the weights that
            config.json asks for, or of several dtypes and `dtype` does not choose.
    """
    folder, files = find_weights(source)
    settings = folder if settings_dir is None else Path(settings_dir)
    checkpoint = Checkpoint(folder, files, settings, adapter)
    transform = Qwen25VLTransform.from_folder(settings)
    if dtype is None:
        if len(formats := sorted(map(str, checkpoint.dtypes))) > 1:
            raise ValueError(f"{folder} holds weights in {', '.join(formats)}: choose with dtype")
        (dtype,) = checkpoint.dtypes
    materialize(checkpoint.model, checkpoint.read(lazily=False), device=device, dtype=dtype)
    return checkpoint.model.eval(), transform


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _own(weight: Tensor) -> Tensor:
    """Return the weight in memory of its own, not a part of a fused weight's."""
    return weight if weight.nbytes == weight.untyped_storage().nbytes() else weight.clone()
