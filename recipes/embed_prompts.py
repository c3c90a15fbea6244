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

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from torchtune_qwen25vl import conditioning, jobs

CONFIG = Path(__file__).with_name("configs") / "embed_prompts.yaml"


def embed(cfg: DictConfig, stack: ExitStack) -> int:
    """Check the encoder, plan, go through this rank's share; return the exit code."""
    settings = jobs.read_settings(cfg, conditioning.Settings)
    rows = settings.rows  # refused, if they cannot be read, before anything is fetched
    ranks = stack.enter_context(closing(jobs.Ranks()))
    run, encoder = conditioning.check_encoder(settings, processes=ranks.local_size)
    place = partial(conditioning.path_of, settings)
    plan = ranks.from_first(lambda: conditioning.plan_run(settings, run, rows, place, stack))
    if settings.dry_run:
        return conditioning.show_plan(plan) if ranks.is_first else 0
    assert encoder is not None
    conditioning.embed_batches(settings, plan, ranks, encoder)
    ranks.wait()
    return ranks.from_first(lambda: conditioning.finish(settings, plan))


def run(cfg: DictConfig) -> int:
    """Run the recipe on a config; return the exit code."""
    return jobs.run_job(partial(embed, cfg))


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of a command line; return the exit code."""
    return jobs.run_command(words, run, conditioning.Settings, usage=str(__doc__), config=CONFIG)


if __name__ == "__main__":
    sys.exit(main())
