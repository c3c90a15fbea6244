"""Prompts embedded a second, against transformers' encoder as diffusers' pipelines call it.

Both begin with texts and PIL images and end with `prompt_embeds` and their mask, on one model of 3B
width and few layers with random weights, whose vocabulary is whole: theirs computes the logits of
every token on the way, and keeps the hidden states of every layer.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from parity import photos, reference, vocabulary
from parity.bench import Row, as_in_jobs, compare
from parity.bench.memory import peak_memory
from parity.stages.conditioning import transforms
from parity.trace import ours_like
from torchtune_qwen25vl.conditioning import PromptEncoder, Task, load_text_encoder

MODEL = "3B with few layers, Qwen's ids"
REPEATS = 2
FP8 = torch.float8_e4m3fn
WORDS = (
    "A coffee shop entrance with a chalkboard sign beside the door and a bicycle against the wall. "
)
TEXTS = [WORDS * count for count in (1, 2, 4, 8)]
Work = Callable[[], object]


def rows() -> Iterator[Row]:
    """Each task on one thread and on all; then loading, and fp8 kept against dequantised."""
    theirs = reference.random_model(MODEL)
    transform, processor = transforms(vocabulary.real(), False)
    encoder = PromptEncoder(as_in_jobs(ours_like(theirs)), transform)
    photo = photos.photo("coffee.png").convert("RGB")
    cases: dict[Task, tuple[Sequence[str], list[Image.Image]]] = {
        "text_to_image": (TEXTS, []),
        "edit": (TEXTS[:1], [photo]),
        "edit_plus": (TEXTS[:1], [photo, photo.resize((500, 700))]),
    }
    for task, (texts, images) in cases.items():
        pipe = reference.pipeline(task, theirs, processor)
        works = _ours(encoder, task, texts, images), _theirs(pipe, task, texts, images)
        peaks = [peak_memory(work) / 2**20 for work in works]
        note = f"peak {peaks[0]:.0f} and {peaks[1]:.0f} MiB, {peaks[0] / peaks[1]:.2f}x"
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            ours, other = compare(*works, repeats=REPEATS, threads=threads)
            yield Row(
                f"{task}: {len(texts)} texts, {len(images)} images", threads, ours, other, note
            )
    yield from _of_fp8(sum(p.numel() for p in theirs.model.parameters()))


def _ours(
    encoder: PromptEncoder, task: Task, texts: Sequence[str], images: list[Image.Image]
) -> Work:
    return lambda: encoder(texts, [images] * len(texts), task=task)


def _theirs(pipe: Any, task: Task, texts: Sequence[str], images: list[Image.Image]) -> Work:
    def work() -> object:
        resized = [reference.condition_image(pipe, task, image) for image in images]
        return reference.prompt_embeds(pipe, texts, resized)

    return work


def _of_fp8(parameters: int) -> Iterator[Row]:
    """A file in fp8 with scales: its peak when loaded, and its speed when kept in fp8.

    Args:
        parameters: how many the encoder has; packed ones are not to be asked for their bytes
    """
    with tempfile.TemporaryDirectory() as scratch:
        path, config = _write_scaled(Path(scratch, "fp8.safetensors")), reference.config(MODEL)
        options: dict[str, Any] = {
            "config": config.to_dict(),
            "tokenizer": vocabulary.real(),
        }
        held = 2 * parameters  # in bf16
        peak = peak_memory(lambda: load_text_encoder(path, **options))
        dequantised = load_text_encoder(path, **options)
        kept = load_text_encoder(path, **options, keep_fp8=True)
        size = sum(t.nbytes for t in kept.model.state_dict().values())
        note = (
            f"kept in fp8 against dequantised to bf16: {size / held:.2f} of the bytes; the "
            f"dequantised one peaks at {peak / held:.2f} of its weights when loaded"
        )
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            ours, other = compare(
                lambda: kept(TEXTS[:2]), lambda: dequantised(TEXTS[:2]), repeats=2, threads=threads
            )
            yield Row("text_to_image: 2 texts, fp8 kept", threads, ours, other, note)


def _write_scaled(path: Path) -> Path:
    """Linear layers in fp8 under a scale each, all else in bf16."""
    weights = {}
    for name, weight in reference.disk_state_dict(reference.random_model(MODEL)).items():
        if weight.ndim == 2 and name.endswith("proj.weight"):
            scale = weight.abs().max() / 448
            weights[name] = (weight / scale).to(FP8)
            weights[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            weights[name] = weight.to(torch.bfloat16)
    save_file({k: w.contiguous() for k, w in weights.items()}, path)
    return path
