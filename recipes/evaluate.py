"""Score a model's own answers to a table of questions, safe to be left alone and to be killed.

    tune-qwen25vl run evaluate --config evaluate model=models/mine source=test.jsonl metrics=anls
    tune-qwen25vl run --nproc_per_node 8 evaluate --config evaluate model=... source=test.jsonl

A table (.csv, .tsv, .json, .jsonl, .parquet, or a folder that `datasets` saved) has a question in
each row, one image or several (image, images, image_name or image_id), and what the answer should
be: one text or a list (reference, references, answer, answers, gt_answer, caption or captions).
Rows of multiple choice have choices or options, and the right one's words, letter or number from 0.
Paths of images start from images_dir, or from the table's folder.

Metrics, of which the score has mean and standard error:
  exact_match       equal but for case, punctuation, articles and spaces; numbers stay numbers
  anls              1 - edits / length of the longer text, 0 below anls_threshold
  cider             CIDEr-D, 0 to 10; words by lower case and without punctuation, not by PTB
  box_iou           whether the first box overlaps by iou_threshold; boxes of the table are
                    [x1, y1, x2, y2] in pixels of the image file, moved to the resized image
  choice            whether the right letter is the likeliest first token after the prompt
  choice_by_answer  whether the answer names the right choice

Answers are greedy, and in fp32 each is the one that its row gets alone; in bf16 one may turn at two
words that are as likely, since other rows are in flight with it. Every row ends in one state: done
or failed (with a reason), and a row that failed is in no mean. A journal in the output folder holds
all answers, so that a run that was stopped goes on where it was when it is started again, and other
metrics or references are scored without asking again. predictions.jsonl has every answer with its
scores, scores.json the means and what they depend on, page.html the worst answers first. A model
may also be the folder of an adapter, of LoRA or DoRA in PEFT's form.

Exit codes: 0 all well, 1 some rows failed (they are named at the end), 2 it could not start or go
on (the reason is the last line; what is done stays done), 130 Ctrl-C stopped it.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from torchtune_qwen25vl import device, evaluation, jobs

logger = logging.getLogger("evaluate")
CONFIG = Path(__file__).with_name("configs") / "evaluate.yaml"


def evaluate(cfg: DictConfig, stack: ExitStack) -> int:
    """Check table and model, plan, ask this rank's share, score it all; return the exit code."""
    settings = jobs.read_settings(cfg, evaluation.Settings)
    truths = settings.truths  # every row has its reference, before anything is fetched
    ranks = stack.enter_context(closing(jobs.Ranks()))
    run, model = jobs.check_model(
        settings, text_tokens=settings.text_tokens, processes=ranks.local_size
    )
    if model is None:  # a dry run without it
        return jobs.show_rows(settings) if ranks.is_first else 0
    workers = stack.enter_context(closing(settings.start_workers(ranks.local_size)))
    questioner = jobs.RowQuestioner(model.transform, settings, max_pixels=run.max_pixels)
    plan = ranks.from_first(
        lambda: jobs.plan_rows(settings, evaluation.Record, run, questioner, workers, stack)
    )
    if settings.dry_run:
        return jobs.show_row_plan(plan) if ranks.is_first else 0
    ask_batches(settings, truths, plan, ranks, model, questioner, workers)
    ranks.wait()
    return ranks.from_first(lambda: evaluation.write_outputs(settings, plan, model, workers))


def ask_batches(
    settings: evaluation.Settings,
    truths: Mapping[str, evaluation.Truth],
    plan: jobs.RowPlan[evaluation.Record],
    ranks: jobs.Ranks,
    model: device.LoadedModel,
    questioner: jobs.RowQuestioner,
    workers: jobs.Workers,
) -> None:
    """Ask the batches of this rank, their images being read ahead of the model."""
    batches = ranks.share(plan.batches)
    with ExitStack() as stack:
        journal = jobs.Journal[evaluation.Record](settings.folder, ranks.rank, plan.run)
        stack.enter_context(closing(journal))
        if ranks.is_first:
            journal.add(plan.unjournaled)
        if not batches:
            return
        rows = [[plan.rows[name] for name in batch] for batch in batches]
        ahead = jobs.Ahead(questioner.batches(rows, workers, ahead=2 * settings.batch_size))
        stack.enter_context(closing(ahead))
        asker = evaluation.Asker(
            model.model,  # loaded now, while the first images are being read
            model.transform,
            settings,
            truths,
            batch_tokens=settings.tokens_together(plan.run.batch_tokens),
        )
        total = sum(map(len, batches))
        progress = jobs.Progress(total, jobs.ROW_STATES, unit="row", show=ranks.is_first)
        stack.enter_context(progress)

        def note(replies: Sequence[evaluation.Reply], problems: Mapping[str, str]) -> None:
            records = evaluation.records_of(replies, problems, settings, plan)
            journal.add(records)
            progress.add(records)

        with device.attention_kernels(model.choice):
            jobs.note_answers(asker, ahead, note, batch_size=settings.batch_size)
        logger.info("%s", progress.speed(ahead.waited))


def run(cfg: DictConfig) -> int:
    """Run the recipe on a config; return the exit code."""
    return jobs.run_job(partial(evaluate, cfg))


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of a command line; return the exit code."""
    return jobs.run_command(words, run, evaluation.Settings, usage=str(__doc__), config=CONFIG)


if __name__ == "__main__":
    sys.exit(main())
