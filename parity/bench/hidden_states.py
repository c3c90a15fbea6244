"""Rows a second of the hidden_states recipe, against plain transformers as the HALP scripts use it.

Both begin with a table and files on disk and end with states in a file and answers, on one model
with random weights that is loaded beforehand. "three forwards" is what the published scripts do for
each row, at batch 1: prepare the inputs twice, run the encoder, run a forward with hooks, and
generate. "one forward" is the best that hooks allow: generate, with hooks that look at its first
forward. Ours is the recipe with all it does besides.
"""

import csv
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from omegaconf import OmegaConf
from PIL import Image

from parity import photos, reference
from parity.bench import Row, as_in_jobs, compare
from parity.bench.captioning import TEXT, VISION, on_cores
from parity.random_folder import WIDE_TEXT, WIDE_VISION, write_random
from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.device import LoadedModel
from torchtune_qwen25vl.recipes import hidden_states

NEW_TOKENS, REPEATS = 16, 2
LIMITS = {"min_pixels": 16 * 784, "max_pixels": 256 * 784}
SIDES = (240, 320, 480, 640)  # of the long side, in pixels
QUESTIONS = ("What is in the image?", "Is there a cat?", "Which colour is the largest thing here?")
CASES = {"tiny": (TEXT, VISION, 64), "3B width, 2 layers": (TEXT | WIDE_TEXT, WIDE_VISION, 12)}


def rows() -> Iterator[Row]:
    """Both models, on one core and on all."""
    cores = sorted(os.sched_getaffinity(0))
    for case, (text, vision, count) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            model = write_random(Path(scratch, "model"), text=text, vision=vision)
            bench = Bench(model, _write_table(Path(scratch), count), count)
            for used in sorted({1, len(cores)}):
                yield from bench.rows(case, cores[:used])


class Bench:
    """All programs on one model and one table."""

    def __init__(self, model: Path, table: Path, count: int) -> None:
        self.source, self.table, self.count = model, table, count
        self.processor = reference.processor(model, **LIMITS)
        self.their_model = reference.load(str(model), torch.float32)
        self.our_model = as_in_jobs(load_pretrained(model)[0])

    def rows(self, case: str, cores: list[int]) -> Iterator[Row]:
        """Milliseconds for a row on these cores."""
        works: dict[str, Callable[[], object]] = {
            "three forwards": self.three_forwards,
            "one forward": self.one_forward,
        }
        for name, theirs in works.items():
            with on_cores(cores):
                times = compare(self.ours, theirs, repeats=REPEATS, threads=len(cores))
            ours, other = (time / self.count for time in times)
            yield Row(f"{case}: {self.count} rows, each; theirs in {name}", len(cores), ours, other)

    def ours(self) -> None:
        """States and answers, by the recipe."""
        with (
            tempfile.TemporaryDirectory() as scratch,
            mock.patch.object(LoadedModel, "model", self.our_model),
        ):
            changes: dict[str, Any] = {
                "model": str(self.source),
                "inputs": str(self.table),
                "output_dir": f"{scratch}/out",
                "device": "cpu",
                "max_new_tokens": NEW_TOKENS,
                **LIMITS,
            }
            cfg = OmegaConf.merge(OmegaConf.load(hidden_states.CONFIG), changes)
            assert hidden_states.run(cfg) == 0

    def three_forwards(self) -> None:
        """What the published scripts do for each row."""
        model, kept = self.their_model, []
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            for question, image in self._rows():
                inputs = self._inputs(question, image)
                with reference.first_outputs(reference.vision_layers(model)[-1:]) as vision:
                    reference.see(model, inputs["pixel_values"], inputs["image_grid_thw"])
                with reference.first_outputs(reference.decoder_layers(model)) as states:
                    model(**inputs)
                answer = self._generate(self._inputs(question, image))
                kept.append((*_spans(vision, states), answer))
            torch.save(kept, f"{scratch}/states")

    def one_forward(self) -> None:
        """The same, all from the first forward of `generate`."""
        model, kept = self.their_model, []
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            for question, image in self._rows():
                with (
                    reference.first_outputs(reference.vision_layers(model)[-1:]) as vision,
                    reference.first_outputs(reference.decoder_layers(model)) as states,
                ):
                    answer = self._generate(self._inputs(question, image))
                kept.append((*_spans(vision, states), answer))
            torch.save(kept, f"{scratch}/states")

    def _rows(self) -> Iterator[tuple[str, Image.Image]]:
        with self.table.open() as file:
            for row in csv.DictReader(file):
                yield row["question"], Image.open(self.table.parent / row["image"]).convert("RGB")

    def _inputs(self, question: str, image: Image.Image) -> Any:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return self.processor(text=[text], images=[image], return_tensors="pt")

    def _generate(self, inputs: Any) -> torch.Tensor:
        pad = self.processor.tokenizer.pad_token_id
        return self.their_model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad
        )


def _spans(vision: list[Any], states: list[Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The vectors that are kept of a row, copied as the scripts do."""
    middle = states[0].shape[1] // 2
    vectors = [state[0, column].clone() for state in states for column in (middle, -1)]
    return vision[0].mean(0), vectors


def _write_table(folder: Path, count: int) -> Path:
    """A table of questions about JPEGs of bundled photos in four sizes."""
    with (folder / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question_id", "image", "question", "answer"])
        for index in range(count):
            photo = photos.photo(photos.PHOTOS[index % len(photos.PHOTOS)]).convert("RGB")
            scale = SIDES[index % len(SIDES)] / max(photo.size)
            size = [max(28, round(side * scale)) for side in photo.size]
            photo.resize((size[0], size[1])).save(folder / f"{index:03}.jpg", quality=90)
            writer.writerow([f"q{index}", f"{index:03}.jpg", QUESTIONS[index % 3], "yes"])
    return folder / "questions.csv"
