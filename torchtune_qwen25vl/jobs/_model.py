"""The model of a job: fetched and checked before anything is planned, loaded when work begins."""

import hashlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from torchtune_qwen25vl import device
from torchtune_qwen25vl._files import read_object
from torchtune_qwen25vl.jobs._journal import Run
from torchtune_qwen25vl.jobs._settings import JobSettings
from torchtune_qwen25vl.weights import Adapter, bytes_to_fetch, fetch, find_adapter, find_weights

logger = logging.getLogger(__name__)


def check_model(
    settings: JobSettings, *, text_tokens: int, processes: int
) -> tuple[Run, device.LoadedModel | None]:
    """Fetch the model and check its files, its memory and its disk; its weights are not read.

    Args:
        settings: of the job
        text_tokens: most tokens of a row beside its image: prompt and answer
        processes: number of ranks that share this machine

    Returns:
        What the results depend on, and the model; no model where a dry run does not fetch it.

    Raises:
        ValueError: if the model cannot be run here, with every reason and its remedy.
    """
    adapter = find_adapter(settings.model) if settings.takes_adapters else None
    if not settings.takes_adapters:
        _refuse_adapter(settings.model)
    model = settings.model if adapter is None else adapter.base
    if settings.dry_run and (away := _describe_download(model, settings.cache_dir)):
        logger.info("%s", away)
        max_pixels = settings.max_pixels or device.MOST_PIXELS
        most = settings.tokens_together(sys.maxsize)  # what memory allows, the files will tell
        return Run(settings.decisive(), max_pixels, most, format=None), None
    source = _fetch(settings, model)
    found = device.check_model(
        source,
        device.look(settings.device, ranks=processes),
        device.Load(text_tokens, settings.min_pixels, settings.max_pixels, settings.own_limits),
        settings_dir=settings.settings_dir,
        adapter=adapter,
        allow_downgrade=settings.allow_downgrade,
        dtype=settings.dtype,
        attention=settings.attention,
        four_bit=settings.four_bit,
        cpu_kernels=settings.cpu_kernels,
    )
    logger.info("%s", found.table)
    choice = found.refuse()
    logger.info("%s", choice)
    run = Run(
        settings.decisive(),
        found.max_pixels,
        found.batch_tokens,
        choice.format,
        digest_of(_files(source, adapter)),
    )
    return run, device.LoadedModel(source, choice, settings.settings_dir, adapter)


def _fetch(settings: JobSettings, model: str) -> Path:
    try:
        return fetch(model, cache_dir=settings.cache_dir, compare=not settings.dry_run)
    except ValueError as error:
        if Path(model).expanduser().exists():
            raise
        raise ValueError(f"there is no such folder here: {model}; {error}") from error


def _refuse_adapter(name: str) -> None:
    """Refuse a folder that holds an adapter and no model, and the file of an adapter.

    Raises:
        ValueError: if it is one, saying how the two become a model.
    """
    path = Path(name).expanduser()
    folder = path if path.is_dir() else path.parent
    adapter, whole = folder / "adapter_config.json", set(folder.glob("*.safetensors"))
    if path.is_file():
        whole &= {path}
    if adapter.is_file() and not {file for file in whole if file.stem != "adapter_model"}:
        base = read_object(adapter).get("base_model_name_or_path", "BASE")
        raise ValueError(
            f"a model is a whole checkpoint, {name} holds an adapter: merge it into its base, as "
            f"peft does by PeftModel.from_pretrained(base, {name!r}).merge_and_unload()"
            f".save_pretrained(FOLDER) with {base} as the base, and name that folder"
        )


def _files(source: Path, adapter: Adapter | None) -> Iterable[Path]:
    folder, names = find_weights(source)
    found = folder.glob("*.safetensors") if names is None else [folder / name for name in names]
    return [*found, *(adapter.folder.glob("adapter_*") if adapter else ())]


def digest_of(files: Iterable[Path]) -> str:
    """Name the state of a model's files by their sizes and times."""
    found = [(path.name, path.stat()) for path in sorted(files)]
    states = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _describe_download(model: str, cache_dir: str | None) -> str:
    """What would have to be fetched first; empty where all is here."""
    away = bytes_to_fetch(model, cache_dir)
    amount = "an unknown part" if away is None else f"{away / 1e9:.2f} GB"
    return "" if away == 0 else f"{amount} of {model} would be fetched first"
