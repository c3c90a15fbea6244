"""The model of a job: fetched and checked before anything is planned, loaded when work begins."""

import logging

from torchtune_qwen25vl import device
from torchtune_qwen25vl.jobs._journal import Run
from torchtune_qwen25vl.jobs._settings import JobSettings

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
    if settings.dry_run and (away := _describe_download(settings)):
        logger.info("%s", away)
        max_pixels = settings.max_pixels or device.MOST_PIXELS
        return Run(settings.decisive(), max_pixels, settings.batch_tokens, format=None), None
    source = device.fetch(
        settings.model, cache_dir=settings.cache_dir, compare=not settings.dry_run
    )
    found = device.check_model(
        source,
        device.look(settings.device, ranks=processes),
        device.Load(text_tokens, settings.min_pixels, settings.max_pixels),
        settings_dir=settings.settings_dir,
        allow_downgrade=settings.allow_downgrade,
        dtype=settings.dtype,
        attention=settings.attention,
        four_bit=settings.four_bit,
    )
    logger.info("%s", found.table)
    choice = found.refuse()
    logger.info("%s", choice)
    run = Run(settings.decisive(), found.max_pixels, found.batch_tokens, choice.format)
    return run, device.LoadedModel(source, choice, settings.settings_dir)


def _describe_download(settings: JobSettings) -> str:
    """What would have to be fetched first; empty where all is here."""
    away = device.bytes_to_fetch(settings.model, settings.cache_dir)
    amount = "an unknown part" if away is None else f"{away / 1e9:.2f} GB"
    return "" if away == 0 else f"{amount} of {settings.model} would be fetched first"
