"""Record hidden states of questions about images, safe to be left alone and to be killed.

    hidden-states TABLE... [--dry-run] [--test] [--retry-failed] [key=value...] [--config FILE]
    tune-qwen25vl run hidden_states --config hidden_states inputs=questions.csv images_dir=images
    tune-qwen25vl run --nproc_per_node 8 hidden_states --config hidden_states inputs=questions.csv

A table (.csv, .tsv, .json, .jsonl, .parquet, or a folder that `datasets` saved) has a question in
each row, and may have question_id, answer or gt_answer, and one image or several: image, images,
image_name or image_id. All other columns are kept. Paths of images start from images_dir, or from
the table's folder. --test does the first three rows in a folder of their own.

What is recorded is a list of selectors SITE/SPAN, such as wanted=[layer.all/query_last]:
  sites  embed, layer.K, attn.K, mlp.K, norm of the decoder; vision, vision.K, merger of the encoder
  K      a block from 0, or from the end (-1); all; a slice (0:28:7); a fraction (n/4, 3n/4, n-1)
  spans  image_first, image_last, image_mean, image_all, query_last, query_mean, last, all;
         of vision sites mean and all
  halp   stands for what the published HALP scripts record
States are taken from the forward that reads the prompt, and the answer goes on from the same one.

Every row ends in one state: done or failed (with a reason). A journal in the output folder holds
all of it, so that a run that was stopped goes on where it was when it is started again. What failed
is tried again once its file has changed, or with --retry-failed; a row whose question has changed
is asked again.

    python -m torchtune_qwen25vl.hidden_states show FOLDER
    python -m torchtune_qwen25vl.hidden_states probe FOLDER label=COLUMN

Exit codes: 0 all well, 1 some rows failed (they are named at the end), 2 it could not start or go
on (the reason is the last line; what is done stays done), 130 Ctrl-C stopped it.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from torchtune_qwen25vl import device, hidden_states, jobs

logger = logging.getLogger("hidden_states")
CONFIG = Path(__file__).with_name("configs") / "hidden_states.yaml"


def extract(cfg: DictConfig, stack: ExitStack) -> int:
    """Check the model, plan, go through this rank's share, write it down; return the exit code."""
    settings = jobs.read_settings(cfg, hidden_states.Settings)
    ranks = stack.enter_context(closing(jobs.Ranks()))
    run, model = jobs.check_model(
        settings, text_tokens=settings.text_tokens, processes=ranks.local_size
    )
    if model is None:  # a dry run without it
        return jobs.show_rows(settings) if ranks.is_first else 0
    layout = hidden_states.layout_of(settings, model)
    workers = stack.enter_context(closing(settings.start_workers(ranks.local_size)))
    questioner = jobs.RowQuestioner(model.transform, settings, max_pixels=run.max_pixels)
    plan = ranks.from_first(
        lambda: hidden_states.plan_run(settings, run, layout, questioner, workers, stack)
    )
    if settings.dry_run:
        return jobs.show_row_plan(plan) if ranks.is_first else 0
    record_batches(settings, plan, layout, ranks, model, questioner, workers)
    ranks.wait()
    used = str(model.choice.device)
    return ranks.from_first(lambda: hidden_states.write_outputs(settings, plan, used))


def record_batches(
    settings: hidden_states.Settings,
    plan: hidden_states.Plan,
    layout: hidden_states.Layout,
    ranks: jobs.Ranks,
    model: device.LoadedModel,
    questioner: jobs.RowQuestioner,
    workers: jobs.Workers,
) -> None:
    """Ask the batches of this rank, their images being read ahead of the model."""
    batches = ranks.share(plan.batches)
    with ExitStack() as stack:
        writer = hidden_states.Writer(settings, plan, layout, ranks.rank)
        stack.enter_context(closing(writer))
        if ranks.is_first:
            writer.add_failed()
        if not batches:
            return
        rows = [[plan.rows[name] for name in batch] for batch in batches]
        ahead = jobs.Ahead(questioner.batches(rows, workers, ahead=2 * settings.batch_size))
        stack.enter_context(closing(ahead))
        extractor = hidden_states.Extractor(model.model, model.transform, settings)
        total = sum(map(len, batches))
        with jobs.Progress(total, jobs.ROW_STATES, unit="row", show=ranks.is_first) as progress:
            for batch in ahead:
                with device.attention_kernels(model.choice):
                    extracts = extractor(batch.questions)
                progress.add(writer.write(extracts, batch.problems))
                jobs.refuse_nan(["" if e.is_finite else e.problem for e in extracts])
            logger.info("%s", progress.speed(ahead.waited))


def run(cfg: DictConfig) -> int:
    """Run the recipe on a config; return the exit code."""
    return jobs.run_job(partial(extract, cfg))


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of a command line; return the exit code."""
    return jobs.run_command(words, run, hidden_states.Settings, usage=str(__doc__), config=CONFIG)


if __name__ == "__main__":
    sys.exit(main())
