"""Caption folders of images, safe to be left alone and to be killed.

    caption INPUT... [--dry-run] [--retry-failed] [key=value...] [--config FILE]
    caption [INPUT...] --apply edits.jsonl
    tune-qwen25vl run caption --config caption inputs=photos preset=detailed
    tune-qwen25vl run --nproc_per_node 8 caption --config caption inputs=photos

Inputs are folders, images, patterns, lists and tables; `--some-key` is short for some_key=True.
Captions may be edited in their text files, or on the review page, whose edits --apply takes.

Before any image is read the model is checked: its files, its memory, its disk. Then the headers of
the images are read, batches are made of images of near-equal size, and worker processes decode them
ahead of the model; an image whose answer has ended gives its place to the next one. Every image
ends in one state: done, skipped (it had a caption), failed (with a reason), cut (at the length
limit) or looped (repeating itself). A journal in the output folder holds all of it, so that a run
that was stopped goes on where it was when it is started again. What failed is tried again once its
file has changed, or with --retry-failed; retry=[cut,looped] asks for captions of those states
again.
Several ranks need one folder for the output that all of them see.

Exit codes: 0 all well, 1 some images failed (they are named at the end), 2 it could not start or go
on (the reason is the last line; what is done stays done), 130 Ctrl-C stopped it.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from torchtune_qwen25vl import captioning, device, jobs

logger = logging.getLogger("caption")
CONFIG = Path(__file__).with_name("configs") / "caption.yaml"


def caption(cfg: DictConfig, stack: ExitStack) -> int:
    """Check the model, plan, caption this rank's share, write it all down; return the exit code."""
    settings = jobs.read_settings(cfg, captioning.Settings)
    if settings.apply is not None:
        return apply_edits(settings, stack)
    jobs.refuse_absent(settings.sources)
    ranks = stack.enter_context(closing(jobs.Ranks()))
    run, model = jobs.check_model(
        settings, text_tokens=settings.text_tokens, processes=ranks.local_size
    )
    workers = stack.enter_context(closing(settings.start_workers(ranks.local_size)))
    planned = ranks.from_first(lambda: captioning.plan_run(settings, run, workers, stack))
    if settings.dry_run:
        return captioning.show_plan(settings, planned) if ranks.is_first else 0
    assert model is not None
    if ranks.is_first:
        captioning.tell_unused(settings, model)
    caption_batches(settings, planned, ranks, model, workers)
    ranks.wait()
    return ranks.from_first(lambda: captioning.write_outputs(settings, planned.plan, workers))


def apply_edits(settings: captioning.Settings, stack: ExitStack) -> int:
    """Write the edits that the review page saved, without a model; return the exit code."""
    workers = stack.enter_context(closing(settings.start_workers(1)))
    return captioning.apply_edits(settings, workers, stack)


def caption_batches(
    settings: captioning.Settings,
    planned: captioning.PlannedRun,
    ranks: jobs.Ranks,
    model: device.LoadedModel,
    workers: jobs.Workers,
) -> None:
    """Caption the batches of this rank, their images being read ahead of the model."""
    plan, batches = planned.plan, ranks.share(planned.batches)
    with ExitStack() as stack:
        journal = jobs.Journal[captioning.Record](settings.folder, ranks.rank, planned.run)
        stack.enter_context(closing(journal))
        if ranks.is_first:
            journal.add(plan.unjournaled)
        if not batches:
            return
        questioner = captioning.Questioner(
            model.transform,
            settings.wording,
            plan.existing,
            min_pixels=settings.min_pixels,
            max_pixels=planned.run.max_pixels,
            thumbnails=captioning.Thumbnails(settings.folder) if settings.review else None,
        )
        items = [[plan.items[name] for name in batch] for batch in batches]
        ahead = jobs.Ahead(questioner.batches(items, workers, ahead=2 * settings.batch_size))
        stack.enter_context(closing(ahead))
        answerer = jobs.Answerer(
            model.model,  # loaded now, while the first images are being read
            model.transform,
            settings.full_preset,
            seed=settings.seed,
            batch_size=settings.batch_size,
            batch_tokens=settings.tokens_together(planned.run.batch_tokens),
            shrunk=lambda question, pixels: questioner.again(plan.items[question.name], pixels),
            min_pixels=settings.min_pixels,
        )
        total = sum(map(len, batches))
        progress = jobs.Progress(total, captioning.STATES, unit="image", show=ranks.is_first)
        stack.enter_context(progress)

        def note(answers: Sequence[jobs.Answer], problems: Mapping[str, str]) -> None:
            records = captioning.records_of(answers, problems, settings, plan)
            progress.add(captioning.write_down(journal, records))

        with device.attention_kernels(model.choice):
            jobs.note_answers(answerer, ahead, note, batch_size=settings.batch_size)
        logger.info("%s", progress.speed(ahead.waited))


def run(cfg: DictConfig) -> int:
    """Run the recipe on a config; return the exit code."""
    return jobs.run_job(partial(caption, cfg))


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of a command line; return the exit code."""
    return jobs.run_command(words, run, captioning.Settings, usage=str(__doc__), config=CONFIG)


if __name__ == "__main__":
    sys.exit(main())
