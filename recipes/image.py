"""Draw images with Qwen-Image: prompts, and images to edit, to a folder of images and a page.

    tune-qwen25vl run image --config image inputs=prompts.csv model=FOLDER
    tune-qwen25vl run --nproc_per_node 8 image --config image inputs=prompts.csv model=FOLDER

The model is a folder or hub id of Qwen-Image, Qwen-Image-Edit, or Qwen-Image-Edit-2509 and 2511, as
diffusers loads it; its text encoder may be another file (text_encoder=, as for embed-prompts).
Prompts are given as to embed-prompts; an edit takes the image in the column image, or beside the
text file. Needs the extra `image`.

All prompts are embedded first, the text encoder's memory is given back, and then the transformer is
loaded. Every prompt ends in one state: done or failed (with a reason). A journal in the output
folder holds all of it, so that a run that was stopped goes on where it was when it is started
again, to the same images. index.html shows all of them.

Exit codes: 0 all well, 1 some prompts failed (they are named at the end), 2 it could not start or
go on (the reason is the last line; what is done stays done), 130 Ctrl-C stopped it.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image

from torchtune_qwen25vl import conditioning, device, jobs, weights
from torchtune_qwen25vl.media import load_image

logger = logging.getLogger("image")
CONFIG = Path(__file__).with_name("configs") / "image.yaml"
TASKS: dict[str, conditioning.Task] = {
    "QwenImagePipeline": "text_to_image",
    "QwenImageEditPipeline": "edit",
    "QwenImageEditPlusPipeline": "edit_plus",
}
AREA = 1024 * 1024  # pixels to which the pipelines bring an image that is edited
NEGATIVE = " (negative)"  # behind the name of a prompt


def draw(cfg: DictConfig, stack: ExitStack) -> int:
    """Plan, embed, draw this rank's share, write the page; return the exit code."""
    settings = jobs.read_settings(cfg, conditioning.ImageSettings)
    source, task = find_pipeline(settings)
    ranks = stack.enter_context(closing(jobs.Ranks()))
    rows = settings.prompts(task)
    run = jobs.Run(settings.decisive(), 0, settings.batch_tokens, None)
    plan = ranks.from_first(
        lambda: conditioning.plan_run(settings, run, rows, partial(file_of, settings), stack)
    )
    if settings.dry_run:
        return conditioning.show_plan(plan) if ranks.is_first else 0
    left = [name for batch in plan.batches for name in batch]
    if left:
        embed(settings, source, task, [plan.rows[name] for name in left], ranks)
    ranks.wait()
    draw_share(settings, plan, source, task, ranks, ranks.share(left))
    ranks.wait()
    return ranks.from_first(lambda: finish(settings, plan))


def find_pipeline(settings: conditioning.ImageSettings) -> tuple[Path, conditioning.Task]:
    """Return the folder of the pipeline, fetched if it is a hub id, and what it is asked for."""
    without = ("text_encoder/*",) if settings.text_encoder else ()
    source = weights.fetch(settings.model, cache_dir=settings.cache_dir, without=without)
    index = source / "model_index.json"
    if not index.is_file():
        raise ValueError(
            f"a model to draw with is a pipeline of diffusers, {source} has no model_index.json: "
            "name the folder or hub id of Qwen-Image, not of its text encoder"
        )
    name = json.loads(index.read_text("utf-8")).get("_class_name")
    if name not in TASKS:
        raise ValueError(f"the pipeline is one of {', '.join(TASKS)}, {source} is {name}")
    return source, TASKS[name]


def file_of(settings: conditioning.ImageSettings, name: str) -> Path:
    """Return the file of an image."""
    return settings.folder / f"{name}.png"


def embed(
    settings: conditioning.ImageSettings,
    source: Path,
    task: conditioning.Task,
    rows: Sequence[jobs.Row],
    ranks: jobs.Ranks,
) -> None:
    """Embed all prompts, and what is to be avoided; then the encoder's memory is free again."""
    asked = settings.embedding(task, source)
    if settings.schedule[1] > 1:
        avoided = [
            replace(row, name=row.name + NEGATIVE, text=settings.negative_prompt) for row in rows
        ]
        rows = [*rows, *avoided]
    with ExitStack() as stack:
        run, encoder = conditioning.check_encoder(asked, processes=ranks.local_size)
        assert encoder is not None
        place = partial(conditioning.path_of, asked)
        plan = ranks.from_first(lambda: conditioning.plan_run(asked, run, rows, place, stack))
        before = device.look(settings.device).free
        conditioning.embed_batches(asked, plan, ranks, encoder)
        after = device.look(settings.device).free
        ranks.wait()
        logger.info(
            "the text encoder is gone: %.2f GB were free before it, %.2f GB are now",
            before / 1e9,
            after / 1e9,
        )


def load_pipeline(
    settings: conditioning.ImageSettings, source: Path, task: conditioning.Task
) -> tuple[Any, device.Choice]:
    """Load transformer and VAE, without the text encoder."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(
            "images need diffusers: pip install 'torchtune-qwen25vl[image]'"
        ) from error
    diffusers.utils.logging.disable_progress_bar()
    machine = device.look(settings.device)
    wishes: dict[str, Any] = {"dtype": settings.dtype, "attention": settings.attention}
    wishes |= {"four_bit": "off", "cpu_kernels": "torch"}  # as diffusers computes
    choice = device.choose(machine, {torch.bfloat16}, **wishes)
    parts = dict.fromkeys(["text_encoder", "tokenizer"])
    parts |= {"processor": None} if task != "text_to_image" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(source, **parts, dtype=choice.dtype)
    if settings.lora is not None:
        pipe.load_lora_weights(Path(settings.lora).expanduser())
        if not getattr(pipe.transformer, "peft_config", None):
            raise ValueError(
                f"{settings.lora} has no weights for this transformer: another model's"
            )
    held = sum(p.numel() for part in (pipe.transformer, pipe.vae) for p in part.parameters())
    if held * choice.dtype.itemsize <= device.look(settings.device).free:
        pipe.to(choice.device)
    elif choice.device.type == "cpu":
        raise ValueError(f"{source} takes {held * choice.dtype.itemsize / 1e9:.1f} GB of memory")
    else:
        logger.warning("transformer and VAE do not fit together: each is moved when it is used")
        pipe.enable_model_cpu_offload(device=choice.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, choice


def draw_share(
    settings: conditioning.ImageSettings,
    plan: conditioning.Plan,
    source: Path,
    task: conditioning.Task,
    ranks: jobs.Ranks,
    names: Sequence[str],
) -> None:
    """Draw these images, one by one."""
    journal = jobs.Journal[conditioning.Record](settings.folder, ranks.rank, plan.run)
    with ExitStack() as stack:
        stack.enter_context(closing(journal))
        if not names:
            return
        pipe, choice = load_pipeline(settings, source, task)
        embeds = jobs.read_journals(settings.embeds_dir, conditioning.Record).records
        progress = stack.enter_context(
            jobs.Progress(len(names), conditioning.STATES, unit="image", show=ranks.is_first)
        )
        for name in names:
            record = draw_one(settings, pipe, choice, task, plan.rows[name], embeds)
            journal.add([record])
            progress.add([record])


def draw_one(
    settings: conditioning.ImageSettings,
    pipe: Any,
    choice: device.Choice,
    task: conditioning.Task,
    row: jobs.Row,
    embeds: Mapping[str, conditioning.Record],
) -> conditioning.Record:
    """Draw one image and write it; return how that ended."""
    asked = conditioning.digest(row)
    try:
        inputs, images = inputs_of(settings, task, row, choice, embeds)
        canvas = fit(settings, pipe, choice, images, inputs["prompt_embeds"].shape[1])
    except ValueError as error:
        return conditioning.Record(row.name, "failed", reason=str(error), asked=asked)
    if canvas.reason:
        logger.warning("%s: %s", row.name, canvas.reason)
    pipe.vae.enable_tiling() if canvas.tiled else pipe.vae.disable_tiling()
    if images:
        inputs["image"] = images if task == "edit_plus" else images[0]
    steps, scale = settings.schedule
    drawing = {"num_inference_steps": steps, "true_cfg_scale": scale}
    chance = jobs.seeded(settings.seed, row.name, torch.device("cpu"))
    try:
        with device.attention_kernels(choice):
            size = {"width": canvas.width, "height": canvas.height}
            image = pipe(**inputs, **size, **drawing, generator=chance).images[0]
    except RuntimeError as error:
        if not device.is_out_of_memory(error):
            raise
        device.release_cache(choice.device)
        reason = f"out of memory at {canvas.width}x{canvas.height}: set a smaller size"
        return conditioning.Record(row.name, "failed", reason=reason, asked=asked)
    note = f"{image.width}x{image.height}, {steps} steps, seed {settings.seed}"
    conditioning.write_image(file_of(settings, row.name), image, row.text, note)
    return conditioning.Record(row.name, "done", asked=asked, note=note)


def inputs_of(
    settings: conditioning.ImageSettings,
    task: conditioning.Task,
    row: jobs.Row,
    choice: device.Choice,
    embeds: Mapping[str, conditioning.Record],
) -> tuple[dict[str, Any], list[Image.Image]]:
    """Read the embeddings of a prompt, and the images that it is about."""
    asked, inputs = settings.embedding(task, Path()), {}
    kinds = {"": "prompt_embeds"}
    if settings.schedule[1] > 1:
        kinds[NEGATIVE] = "negative_prompt_embeds"
    for suffix, key in kinds.items():
        if embeds[row.name + suffix].state == "failed":
            raise ValueError(embeds[row.name + suffix].reason)
        stored = conditioning.read_embeds(conditioning.path_of(asked, row.name + suffix))
        inputs[key] = stored.embeds.to(choice.device, choice.dtype)
        inputs[f"{key}_mask"] = stored.mask.to(choice.device)
    images = [load_image(s.read() if isinstance(s, jobs.Held) else s) for s in row.sources]
    return inputs, images if task != "text_to_image" else []


def fit(
    settings: conditioning.ImageSettings,
    pipe: Any,
    choice: device.Choice,
    images: Sequence[Image.Image],
    tokens: int,
) -> conditioning.Canvas:
    """Choose the size of an image by the settings, or its source, and by the memory."""
    if settings.size is not None or not images:
        width, height = conditioning.read_size(settings.size or "1:1")
    else:
        width, height = conditioning.sized(images[-1].width, images[-1].height, AREA)
    config = pipe.transformer.config
    memory = conditioning.Memory(
        free=device.look(str(choice.device)).free,
        width=config.num_attention_heads * config.attention_head_dim,
        vae_width=pipe.vae.config.base_dim,
        itemsize=choice.dtype.itemsize,
        context=tokens + len(images) * AREA // 256,  # a token is 16 * 16 pixels
    )
    return memory.fit(width, height)


def finish(settings: conditioning.ImageSettings, plan: conditioning.Plan) -> int:
    """Write the page, and say how the run ended; return the exit code."""
    records = conditioning.records_of(settings, plan)
    images = [
        conditioning.Drawn(
            name,
            row.text,
            f"{name}.png" if records[name].state == "done" else "",
            records[name].note or records[name].reason,
        )
        for name, row in plan.rows.items()
    ]
    page = conditioning.write_sheet(settings.folder, f"{len(images)} prompts", images)
    logger.info("all images: %s", page)
    return conditioning.finish(settings, plan, what="images")


def run(cfg: DictConfig) -> int:
    """Run the recipe on a config; return the exit code."""
    return jobs.run_job(partial(draw, cfg))


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of a command line; return the exit code."""
    return jobs.run_command(
        words, run, conditioning.ImageSettings, usage=str(__doc__), config=CONFIG
    )


if __name__ == "__main__":
    sys.exit(main())
