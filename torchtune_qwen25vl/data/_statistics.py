"""Numbers and a figure of how long the rows of a data set are."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtune_qwen25vl._plots import write_figure
from torchtune_qwen25vl.data._check import Sound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}


def summary(rows: list[Sound]) -> dict[str, Any]:
    """Return totals, means and quantiles of tokens, labelled tokens, placeholders and pixels."""
    tokens, labelled = [row.tokens for row in rows], [row.labelled for row in rows]
    return {
        "tokens": _spread(tokens),
        "labelled_tokens": _spread(labelled),
        "labelled_share": sum(labelled) / max(sum(tokens), 1),
        "visual_tokens": _spread([row.visual for row in rows]),
        "images_and_videos": _spread([len(row.pixels) for row in rows]),
        "pixels": _spread([pixels for row in rows for pixels in row.pixels]),
    }


def write_histogram(path: Path, rows: list[Sound], title: str) -> None:
    """Draw how many rows have how many tokens, placeholders, and which share labelled."""
    write_figure(path, lambda figure: _draw(figure, rows, title), size=(12, 3.6), dpi=100)


def _draw(figure: "Figure", rows: list[Sound], title: str) -> None:
    figure.suptitle(title)
    panels: dict[str, list[float]] = {
        "tokens": [row.tokens for row in rows],
        "visual tokens": [row.visual for row in rows],
        "labelled tokens, % of the row": [100 * row.labelled / row.tokens for row in rows],
    }
    for axes, (name, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.hist(values, bins=40, color="#3b6ea5")
        axes.set_xlabel(name)
        axes.set_ylabel("rows")
        if values:
            axes.axvline(
                float(np.mean(values)), color="#c0392b", label=f"mean {np.mean(values):.0f}"
            )
            axes.legend()


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {"total": 0}
    spread = {name: float(np.quantile(values, at)) for name, at in QUANTILES.items()}
    return {"total": sum(values), "mean": float(np.mean(values)), **spread}
