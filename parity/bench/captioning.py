"""Images a second of the caption recipe, against transformers batched the usual way.

Both begin with files on disk and end with texts, on one model with random weights. Theirs: eight
files at a time, opened, through the processor with left padding, greedy `generate`, decoded. Ours:
the recipe with all it does besides (headers, journal, text files, table), as it is set up by
default. Both models are loaded beforehand, and both make the same number of tokens for every image.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import OmegaConf
from PIL import Image

from parity import photos, reference
from parity.bench import Row, as_in_jobs, compare
from parity.random_folder import write_random
from parity.serve import captioning_vllm, find_vllm, template_of
from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.device import LoadedModel
from torchtune_qwen25vl.jobs import Progress
from torchtune_qwen25vl.recipes import caption

BATCH, NEW_TOKENS, COUNT, REPEATS = 8, 32, 128, 2
LIMITS = {"min_pixels": 16 * 784, "max_pixels": 256 * 784}
LONG_SIDES = (120, 180, 240, 320, 480, 640, 960, 1280)  # pixels; a folder of all sizes
PROMPT = "Describe this image in one or two plain sentences."
TEXT = {  # for each token 2.6 times the work of the vision tower, as in 7B
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 3840,
}
VISION = {"depth": 4, "hidden_size": 160, "num_heads": 2, "intermediate_size": 428}


def rows() -> Iterator[Row]:
    """A folder of photos, on one core and on all."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        model = write_random(Path(scratch, "model"), text=TEXT, vision=VISION)
        pictures = _write_photos(Path(scratch, "photos"))
        bench = Bench(model, pictures)
        yield from (bench.row(cores[:count]) for count in sorted({1, len(cores)}))


def rows_against(peer: str) -> Iterator[Row]:
    """The same folder against vLLM, each in fp32 and bf16: files to texts on both sides."""
    assert peer == "vllm"
    python, cores = find_vllm(), sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        model = write_random(Path(scratch, "model"), text=TEXT, vision=VISION)
        pictures = _write_photos(Path(scratch, "photos"))
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            bench = Bench(model, pictures, dtype)
            job = {
                "folder": str(model),
                "dtype": name,
                "limits": LIMITS,
                "batch_size": 32,
                "new_tokens": NEW_TOKENS,
                "prompt": PROMPT,
                "template": template_of(model),
                "photos": list(map(str, bench.paths)),
            }
            for count in sorted({1, len(cores)}):
                yield bench.row_against(python, job, cores[:count])


class Bench:
    """Both programs on one model and one folder of photos."""

    def __init__(self, model: Path, pictures: Path, dtype: torch.dtype = torch.float32) -> None:
        self.waited = 0.0
        self.source, self.pictures = model, pictures
        self.paths = sorted(pictures.iterdir())
        self.processor = reference.processor(model, **LIMITS)
        self.processor.tokenizer.padding_side = "left"
        self.their_model = reference.load(str(model), torch.float32)
        self.our_model = as_in_jobs(load_pretrained(model, dtype=dtype)[0])
        self.dtype = "bf16" if dtype == torch.bfloat16 else "fp32"
        self.run = caption.run

    def row(self, cores: list[int]) -> Row:
        """Milliseconds for an image on these cores."""
        with on_cores(cores):
            times = compare(self.ours, self.theirs, repeats=REPEATS, threads=len(cores))
        same = sum(a == b for a, b in zip(self.ours(), self.theirs(), strict=True))
        note = f"{same} of {COUNT} captions the same; model waited {self.waited:.1%} of the time"
        milliseconds, theirs = (time / COUNT for time in times)
        return Row(f"{COUNT} photos, each", len(cores), milliseconds, theirs, note)

    def row_against(self, python: Path, job: dict[str, Any], cores: list[int]) -> Row:
        """Milliseconds for an image on these cores, theirs being vLLM's, loaded beforehand."""
        with on_cores(cores), captioning_vllm(python, job) as theirs:
            times = compare(self.ours, theirs, repeats=REPEATS, threads=len(cores))
            same = sum(a == b for a, b in zip(self.ours(), theirs(), strict=True))
        ours, other = (time / COUNT for time in times)
        note = f"{same} of {COUNT} captions the same"
        return Row(f"{COUNT} photos, {self.dtype}, vLLM", len(cores), ours, other, note)

    def theirs(self) -> list[str]:
        """Their captions, in batches of eight."""
        captions = []
        for start in range(0, COUNT, BATCH):
            paths = self.paths[start : start + BATCH]
            images = [Image.open(path).convert("RGB") for path in paths]
            inputs = self.processor(
                text=[self._their_prompt()] * len(images),
                images=images,
                padding=True,
                return_tensors="pt",
            )
            tokens = self.their_model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
            new = tokens[:, inputs["input_ids"].shape[1] :]
            captions += self.processor.batch_decode(new, skip_special_tokens=True)
        return [caption.strip() for caption in captions]

    def _their_prompt(self) -> str:
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def ours(self) -> list[str]:
        """Our captions, by the recipe."""
        with tempfile.TemporaryDirectory() as scratch, self._loaded():
            changes: dict[str, Any] = {
                "model": str(self.source),
                "inputs": str(self.pictures),
                "output_dir": f"{scratch}/out",
                "mirror_dir": f"{scratch}/texts",
                "write_states": ["done", "cut", "looped"],
                "device": "cpu",
                "dtype": self.dtype,
                "max_new_tokens": NEW_TOKENS,
                "prompt": PROMPT,
                "review": False,
                **LIMITS,
            }
            cfg = OmegaConf.load(caption.CONFIG)
            self.run(OmegaConf.merge(cfg, changes))
            lines = Path(scratch, "out", "captions.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["caption"] for line in lines]

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[None]:
        """The model in place of loading it, and an ear for the time that it waited."""
        speed = Progress.speed

        def hear(progress: Progress, waited: float) -> str:
            self.waited = waited / progress.seconds
            return speed(progress, waited)

        with (
            mock.patch.object(LoadedModel, "model", self.our_model),
            mock.patch.object(Progress, "speed", hear),
        ):
            yield


@contextlib.contextmanager
def on_cores(cores: list[int]) -> Iterator[None]:
    """This process and those it starts on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _write_photos(folder: Path) -> Path:
    """JPEGs of bundled photos, their long sides drawn from a wide range."""
    folder.mkdir()
    for index in range(COUNT):
        photo = photos.photo(photos.PHOTOS[index % len(photos.PHOTOS)]).convert("RGB")
        scale = LONG_SIDES[5 * index % len(LONG_SIDES)] / max(photo.size)
        size = [max(28, round(side * scale)) for side in photo.size]
        photo.resize((size[0], size[1])).save(folder / f"{index:03}.jpg", quality=90)
    return folder
