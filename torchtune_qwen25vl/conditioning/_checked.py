"""The text encoder of a job: checked before anything is planned, loaded when work begins."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtune_qwen25vl import device
from torchtune_qwen25vl.conditioning._encoder import PromptEncoder
from torchtune_qwen25vl.conditioning._load import (
    build,
    files_of,
    load_text_encoder,
    open_file,
    refuse_for_folders,
)
from torchtune_qwen25vl.conditioning._settings import Settings
from torchtune_qwen25vl.conditioning._tokenizer import make_transform
from torchtune_qwen25vl.jobs import Run, check_model, digest_of
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import Qwen25VLTransform
from torchtune_qwen25vl.weights import Checkpoint, fetch

logger = logging.getLogger(__name__)


@dataclass
class CheckedEncoder:
    """A text encoder that can be loaded here.

    Attributes:
        transform: its own
        choice: how it is run
        load: loads it
    """

    transform: Qwen25VLTransform
    choice: device.Choice
    load: Callable[[], PromptEncoder]


def check_encoder(settings: Settings, *, processes: int) -> tuple[Run, CheckedEncoder | None]:
    """Fetch the encoder and check its files and the memory; its weights are not read.

    Args:
        settings: of the job
        processes: number of ranks that share this machine

    Returns:
        What the results depend on, and the encoder; none where a dry run does not fetch it.

    Raises:
        ValueError: if it cannot be run here, saying why.
    """
    source = Path(settings.model).expanduser()
    if not source.exists() and not settings.dry_run:
        source = fetch(settings.model, cache_dir=settings.cache_dir)
    if not source.is_file() and not (source / "model_index.json").exists():
        return _check_checkpoint(settings, processes)
    if (
        settings.four_bit not in ("auto", "off")
        or settings.allow_downgrade
        or settings.settings_dir
    ):
        raise ValueError(
            "four_bit, allow_downgrade and settings_dir are for folders of a whole model, "
            f"{source} is none: leave them out (tokenizer and config name what lies elsewhere)"
        )
    return _check_other(settings, source, processes)


def _check_checkpoint(settings: Settings, processes: int) -> tuple[Run, CheckedEncoder | None]:
    named = {"tokenizer": settings.tokenizer, "config": settings.config, "mmproj": settings.mmproj}
    if given := [name for name, value in {**named, "keep_fp8": settings.keep_fp8}.items() if value]:
        raise ValueError(f"{', '.join(given)} is for single files: leave it out")
    run, model = check_model(settings, text_tokens=settings.text_tokens, processes=processes)
    if model is None:
        return run, None
    return run, CheckedEncoder(
        model.transform, model.choice, lambda: PromptEncoder(model.model, model.transform)
    )


def _check_other(settings: Settings, source: Path, processes: int) -> tuple[Run, CheckedEncoder]:
    """Check a single file, or the text encoder in a pipeline's folder."""
    machine = device.look(settings.device, ranks=processes)
    folder = source / "text_encoder" if source.is_dir() else source.parent
    single: dict[str, Any] = {
        name: getattr(settings, name) for name in ("config", "mmproj", "keep_fp8")
    }
    if source.is_dir():
        refuse_for_folders(**single)
        checkpoint = Checkpoint(folder, None, folder)
        model, stored = checkpoint.model, checkpoint.files.dtypes
        files = list(folder.glob("*.safetensors"))
    else:
        weights = open_file(source, settings.mmproj)
        model, stored = build(weights, settings.config), {weights.dtype}
        files = files_of(source, settings.mmproj)
    wishes: dict[str, Any] = {
        name: getattr(settings, name) for name in ("dtype", "attention", "cpu_kernels")
    }
    choice = device.choose(machine, stored, **wishes, four_bit="off")
    _refuse_too_large(model, choice, machine.free, machine.name)
    logger.info("%s", choice)
    budget = settings.batch_tokens
    run = Run(settings.decisive(), 0, budget, choice.format, digest_of(files))
    where: dict[str, Any] = {"tokenizer": settings.tokenizer, "device": choice.device}

    def load() -> PromptEncoder:
        encoder = load_text_encoder(source, dtype=choice.dtype, **where, **single)
        device.use_kernels(encoder.model, choice)
        return encoder

    return run, CheckedEncoder(make_transform(settings.tokenizer, folder), choice, load)


def _refuse_too_large(model: Qwen25VL, choice: device.Choice, free: int, name: str) -> None:
    needed = sum(p.numel() for p in model.parameters()) * choice.dtype.itemsize
    if needed > free:
        raise ValueError(
            f"the encoder cannot be run here: {needed / 1e9:.2f} GB of weights, {free / 1e9:.2f} "
            f"GB of {name} free; free memory, or take a smaller one"
        )
