"""Figures as PNG files; drawing them needs matplotlib, the extra `plots`."""

import io
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torchtune_qwen25vl._files import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(
    path: Path, draw: "Callable[[Figure], None]", *, size: tuple[float, float], dpi: int
) -> None:
    """Draw a figure and write it as a PNG file; without matplotlib, say that there is none.

    A figure only shows what a report holds in numbers, so a run without it is complete.

    Args:
        path: file to write
        draw: called with the empty figure
        size: width and height in inches
        dpi: pixels of an inch
    """
    if find_spec("matplotlib") is None:
        remedy = "install torchtune-qwen25vl[plots] to have it"
        print(f"{path} is not drawn, since that needs matplotlib; {remedy}", file=sys.stderr)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_file(path, content.getvalue())
