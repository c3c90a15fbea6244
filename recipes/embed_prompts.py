"""Embed prompts for Qwen-Image, a file each, safe to be left alone and to be killed.

    embed-prompts PROMPTS... [--dry-run] [--retry-failed] [key=value...] [--config FILE]
    tune-qwen25vl run embed_prompts --config embed_prompts inputs=prompts.csv model=FOLDER
    tune-qwen25vl run --nproc_per_node 8 embed_prompts --config embed_prompts inputs=prompts.csv

Prompts are rows of a table (.csv, .tsv, .json, .jsonl, .parquet, or a folder that `datasets` saved)
with a column prompt, and where there are images to edit image; or a folder whose .txt files hold a
prompt each, the image to edit beside it under the same name; or a .txt file with a prompt a line.

  task=text_to_image  no images
  task=edit           one image for each prompt, Qwen-Image-Edit
  task=edit_plus      any number, Qwen-Image-Edit-2509 and 2511

The model is a folder, a hub id, or a single file: .safetensors as ComfyUI and DiffSynth have them
(plain, fp8, fp8 with scales), or .gguf. A file NAME.safetensors holds prompt_embeds [1, l, d] and
prompt_embeds_mask [1, l], what diffusers' pipelines take by these names; layout=musubi writes the
cache of musubi-tuner instead.

Every prompt ends in one state: done or failed (with a reason). A journal in the output folder holds
all of it, so that a run that was stopped goes on where it was when it is started again.

Exit codes: 0 all well, 1 some prompts failed (they are named at the end), 2 it could not start or
go on (the reason is the last line; what is done stays done), 130 Ctrl-C stopped it.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from torchtune_qwen25vl import conditioning, device, jobs

logger = logging.getLogger("embed_prompts")
CONFIG = Path(__file__).with_name("configs") / "embed_prompts.yaml"


def embed(cfg: DictConfig, stack: ExitStack) -> int:
    """Check the encoder, plan, go through this rank's share; return the exit code."""
    settings = jobs.read_settings(cfg, conditioning.Settings)
    ranks = stack.enter_context(closing(jobs.Ranks()))
    run, encoder = conditioning.check_encoder(settings, processes=ranks.local_size)
    plan = ranks.from_first(lambda: conditioning.plan_run(settings, run, stack))
    if settings.dry_run:
        return conditioning.show_plan(plan) if ranks.is_first else 0
    assert encoder is not None
    embed_batches(settings, plan, ranks, encoder, stack)
    ranks.wait()
    return ranks.from_first(lambda: conditioning.finish(settings, plan))


def embed_batches(
    settings: conditioning.Settings,
    plan: conditioning.Plan,
    ranks: jobs.Ranks,
    encoder: conditioning.CheckedEncoder,
    stack: ExitStack,
) -> None:
    """Embed the batches of this rank, their images being read ahead of the model."""
    journal = jobs.Journal[conditioning.Record](settings.folder, ranks.rank, plan.run)
    stack.enter_context(closing(journal))
    batches = [[plan.rows[name] for name in batch] for batch in ranks.share(plan.batches)]
    if not batches:
        return
    workers = stack.enter_context(closing(settings.start_workers(ranks.local_size)))
    prompter = conditioning.Prompter(encoder.transform, settings)
    ahead = jobs.Ahead(prompter.batches(batches, workers, ahead=2 * settings.batch_size))
    with closing(ahead):
        row_tokens = min(settings.batch_tokens, plan.run.batch_tokens)
        embedder = conditioning.Embedder(encoder.load(), row_tokens)
        total = sum(map(len, batches))
        with jobs.Progress(
            total, conditioning.STATES, unit="prompt", show=ranks.is_first
        ) as progress:
            for batch in ahead:
                with device.attention_kernels(encoder.choice):
                    embedded = embedder(batch.prompts)
                progress.add(
                    conditioning.write_down(settings, plan, journal, embedded, batch.problems)
                )
                jobs.refuse_nan(["" if one.is_finite else one.problem for one in embedded])
            logger.info("%s", progress.speed(ahead.waited))


def run(cfg: DictConfig) -> int:
    """Run the recipe on a config; return the exit code."""
    return jobs.run_job(partial(embed, cfg))


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of a command line; return the exit code."""
    return jobs.run_command(words, run, conditioning.Settings, usage=str(__doc__), config=CONFIG)


if __name__ == "__main__":
    sys.exit(main())
