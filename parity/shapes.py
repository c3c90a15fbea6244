"""What the model of shapes_tiny learned: in numbers, and against transformers token for token."""

import json
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from parity import reference
from torchtune_qwen25vl import load_pretrained, shapes
from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.data._statistics import png


def report(folder: Path, seconds: float, *, pictures: int = 500) -> dict[str, float | bool]:
    """Caption held-out pictures with the trained folder and write shapes-report.json beside it.

    Also draws loss-curve.png from the logs of the run, and captions.png, pictures with what the
    model says of them.

    Holds `attributes`, the share named exactly right; `attributes_blank`, the same with blank
    pictures; `attributes_constant`, that of the luckiest single caption, which is what chance
    reaches; `transformers_equal`, whether transformers says the same, token for token; `seconds`.
    """
    model, transform = load_pretrained(folder)
    scenes = shapes.held_out_scenes(pictures)
    images = shapes.pictures(scenes)
    ours = shapes.caption(model, transform, images)
    unseen = shapes.caption(model, transform, [shapes.blank(image) for image in images])
    captions = [scene.caption for scene in scenes]
    said = [transform.decode(caption) for caption in ours]
    result = {
        "attributes": shapes.share_right(said, scenes),
        "attributes_blank": shapes.share_right([transform.decode(c) for c in unseen], scenes),
        "attributes_constant": max(
            shapes.share_right([constant] * len(scenes), scenes) for constant in set(captions)
        ),
        "transformers_equal": _theirs(folder, images) == ours,
        "seconds": seconds,
    }
    files = {
        "loss-curve.png": draw_losses(folder.parent / "logs"),
        "captions.png": draw_captions(images, said, scenes),
        "shapes-report.json": (json.dumps(result, indent=2) + "\n").encode(),
    }
    for name, content in files.items():
        write_file(folder.parent / name, content)
    return result


def read_losses(logs: Path) -> dict[str, dict[int, float]]:
    """Loss and validation loss by step, from all logs of a run; a later one counts."""
    found: dict[str, dict[int, float]] = {"loss": {}, "val_loss": {}}
    for path in sorted(logs.iterdir(), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            for name, value in re.findall(r" (loss|val_loss):(\S+)", line):
                found[name][int(line.split()[1])] = float(value)
    return {name: dict(sorted(losses.items())) for name, losses in found.items()}


def draw_losses(logs: Path) -> bytes:
    """A picture of the loss of the run over its steps, PNG."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, losses), style in zip(read_losses(logs).items(), ("-", "o"), strict=True):
        axes.plot(list(losses), list(losses.values()), style, label=name)
    axes.set(yscale="log", xlabel="step", ylabel="loss of a labelled token, nats")
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure, dpi=100)


def draw_captions(images: list[Image.Image], said: list[str], scenes: list[shapes.Scene]) -> bytes:
    """The first pictures with their captions, wrong ones in red, PNG."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    for axes, image, words, scene in zip(
        figure.subplots(4, 6).flat, images, said, scenes, strict=False
    ):
        axes.imshow(image)
        axes.set_title(
            words.replace(" a ", "\na ", 1) if scene.kind == "relation" else words,
            color="black" if words == scene.caption else "#c0392b",
            fontsize=9,
        )
        axes.axis("off")
    return png(figure, dpi=80)


def _theirs(folder: Path, images: list[Image.Image]) -> list[list[int]]:
    """Greedy captions by transformers, from the folder alone: its processor, its generate."""
    model = reference.load(str(folder), torch.float32)
    processor = reference.processor(folder)
    return [reference.answer(model, processor, shapes.QUESTION, image) for image in images]
