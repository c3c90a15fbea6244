"""What the model of shapes_tiny learned: in numbers, and as figures where matplotlib is there."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl._plots import write_figure
from torchtune_qwen25vl.shapes._captions import blank, caption, held_out_scenes, share_right
from torchtune_qwen25vl.shapes._scenes import Scene, draw
from torchtune_qwen25vl.weights import load_pretrained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(folder: Path, seconds: float, *, images: int = 500) -> dict[str, float]:
    """Caption held-out images with a trained model and write shapes-report.json beside its folder.

    With matplotlib, also draw loss-curve.png from the logs of the run, and captions.png, images
    with what the model says of them.

    Args:
        folder: the model; logs of its run are in `logs` beside it
        seconds: how long training took
        images: how many are captioned

    Returns:
        what shapes-report.json holds: `attributes`, the share named exactly right;
        `attributes_blank`, the same with blank images; `attributes_constant`, that of the luckiest
        single caption, which is what chance reaches; `seconds`.
    """
    model, transform = load_pretrained(folder)
    scenes = held_out_scenes(images)
    drawn = [draw(scene) for scene in scenes]
    said, unseen = (
        [transform.decode(tokens) for tokens in caption(model, transform, shown)]
        for shown in (drawn, [blank(image) for image in drawn])
    )
    constants = {scene.caption for scene in scenes}
    result = {
        "attributes": share_right(said, scenes),
        "attributes_blank": share_right(unseen, scenes),
        "attributes_constant": max(share_right([one] * len(scenes), scenes) for one in constants),
        "seconds": seconds,
    }
    target = folder.parent
    write_file(target / "shapes-report.json", (json.dumps(result, indent=2) + "\n").encode())
    losses = read_losses(target / "logs")
    write_figure(
        target / "loss-curve.png", lambda f: _draw_losses(f, losses), size=(8, 4.5), dpi=100
    )
    write_figure(
        target / "captions.png",
        lambda f: _draw_captions(f, drawn, said, scenes),
        size=(14, 9),
        dpi=80,
    )
    return result


def read_losses(logs: Path) -> dict[str, dict[int, float]]:
    """Read loss and validation loss by step from all logs of a run; a later log counts."""
    found: dict[str, dict[int, float]] = {"loss": {}, "val_loss": {}}
    for path in sorted(logs.iterdir(), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            for name, value in re.findall(r" (loss|val_loss):(\S+)", line):
                found[name][int(line.split()[1])] = float(value)
    return {name: dict(sorted(losses.items())) for name, losses in found.items()}


def _draw_losses(figure: "Figure", losses: dict[str, dict[int, float]]) -> None:
    """Draw both losses over the steps."""
    axes = figure.subplots()
    for (name, values), style in zip(losses.items(), ("-", "o"), strict=True):
        axes.plot(list(values), list(values.values()), style, label=name)
    positive = all(loss > 0 for values in losses.values() for loss in values.values())
    axes.set(yscale="log" if positive else "linear", xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_captions(
    figure: "Figure", images: list[Image.Image], said: list[str], scenes: list[Scene]
) -> None:
    """Draw the first images with their captions, wrong ones in red."""
    for axes, image, words, scene in zip(
        figure.subplots(4, 6).flat, images, said, scenes, strict=False
    ):
        axes.imshow(image)
        shown = ascii(words)[1:-1]  # no font has all that a model says before it has learned
        axes.set_title(
            shown.replace(" a ", "\na ", 1) if scene.kind == "relation" else shown,
            color="black" if words == scene.caption else "#c0392b",
            fontsize=9,
        )
        axes.axis("off")
