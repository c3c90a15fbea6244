"""A checkpoint in use: its tokenizer is read at once, its weights when they are needed."""

import gc
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchtune_qwen25vl.device._choice import Choice, Format
from torchtune_qwen25vl.device._memory import release_cache
from torchtune_qwen25vl.device._preflight import processor_of
from torchtune_qwen25vl.model import Qwen25VL, hold_in_int4, pack, qwen2_5_vl_from_config
from torchtune_qwen25vl.transform import Qwen25VLTransform
from torchtune_qwen25vl.weights import (
    Adapter,
    Checkpoint,
    find_weights,
    load_pretrained,
    materialize,
)

logger = logging.getLogger(__name__)

FROZEN_NF4 = {
    "decoder_trainable": "frozen",
    "vision_trainable": "frozen",
    "merger_trainable": "frozen",
    "quantize_base": True,
}


class LoadedModel:
    """A checkpoint whose weights are loaded on first use and can be released.

    Args:
        source: folder or .safetensors file
        choice: how the model is run
        settings_dir: folder of config.json and tokenizer, for weights that lie elsewhere
        adapter: is merged into the weights; the settings of its processor go before theirs

    Raises:
        ValueError: if the settings have no tokenizer of Qwen2.5-VL, or no image processor.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        choice: Choice,
        settings_dir: str | os.PathLike[str] | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.source, self.choice = source, choice
        self.settings_dir, self._adapter = settings_dir, adapter
        self.settings = Path(settings_dir) if settings_dir else find_weights(source)[0]
        self.transform = Qwen25VLTransform.from_folder(processor_of(self.settings, adapter))
        self._model: Qwen25VL | None = None

    @property
    def model(self) -> Qwen25VL:
        """Return the model, which the first call loads."""
        if self._model is None:
            self._model = load(self.source, self.choice, self.settings_dir, self._adapter)
        return self._model

    def release(self) -> None:
        """Give back the memory of the weights, even if someone still holds the model."""
        if self._model is not None:
            self._model.to_empty(device="meta")
            self._model = None
        gc.collect()
        release_cache(self.choice.device)


def load(
    source: str | os.PathLike[str],
    choice: Choice,
    settings_dir: str | os.PathLike[str] | None = None,
    adapter: Adapter | None = None,
) -> Qwen25VL:
    """Load a model with its weights, as chosen.

    Args:
        source: folder, .safetensors file or hub id
        choice: how the model is run
        settings_dir: folder of config.json and tokenizer, for weights that lie elsewhere
        adapter: is merged into the weights

    Raises:
        ValueError: as `load_pretrained`, or if a layer does not suit the format.
    """
    logger.info("loading %s", source)
    if choice.four_bit:
        model = _load_four_bit(source, choice, settings_dir, adapter)
    else:
        options: Any = {"dtype": choice.dtype, "device": choice.device, "adapter": adapter}
        model, _ = load_pretrained(source, **options, settings_dir=settings_dir)
    use_kernels(model, choice)
    return model


def use_kernels(model: Qwen25VL, choice: Choice) -> None:
    """Pack the weights of a loaded model where that is chosen; it is for inference from then on."""
    if choice.cpu_kernels == "onednn":
        pack(model)


def _load_four_bit(
    source: str | os.PathLike[str],
    choice: Choice,
    settings_dir: str | os.PathLike[str] | None,
    adapter: Adapter | None,
) -> Qwen25VL:
    """Load a model whose weights are quantised on the device, one at a time."""
    assert choice.four_bit is not None
    folder, files = find_weights(source)
    settings = folder if settings_dir is None else Path(settings_dir)
    checkpoint = Checkpoint(folder, files, settings, adapter)
    model = empty_four_bit(settings / "config.json", choice.four_bit)
    weights = checkpoint.read(lazily=False)
    materialize(model, weights, device=choice.device, dtype=choice.dtype)
    return model.eval()


def empty_four_bit(config: Path | Mapping[str, Any], four_bit: Format) -> Qwen25VL:
    """Build a model on the meta device, its decoder's layers in 4 bits.

    Args:
        config: config.json, or its content
        four_bit: format of the layers

    Raises:
        ValueError: if a layer does not suit the format.
    """
    try:
        with torch.device("meta"):
            if four_bit == "int4":
                return hold_in_int4(qwen2_5_vl_from_config(config))
            return qwen2_5_vl_from_config(config, **FROZEN_NF4)
    except AssertionError as error:  # torchao's
        raise ValueError(
            f"the decoder's layers are not whole blocks of NF4 ({error}); set four_bit=off"
        ) from error
