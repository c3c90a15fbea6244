"""Images in files, and the contact sheet: all images of a run on one page."""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image, PngImagePlugin

from torchtune_qwen25vl._files import write_file

FILE = "index.html"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem; background: #f4f4f2; color: #222; }
h1 { font-size: 1.3rem; font-weight: 600; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 1.2rem; }
figure { margin: 0; background: #fff; border-radius: 6px; overflow: hidden;
         box-shadow: 0 1px 3px #0002; }
img { width: 100%; display: block; }
figcaption { padding: .6rem .8rem .8rem; overflow-wrap: anywhere; }
small { color: #777; }
.failed { padding: 1rem; color: #a33; }
"""


class Drawn(NamedTuple):
    """One line of the sheet."""

    name: str
    prompt: str
    file: str  # beside the page; empty where there is none
    note: str  # size and seed, or why there is none


def write_image(path: Path, image: Image.Image, prompt: str, note: str) -> None:
    """Write a PNG that says what it was drawn from, whole or not at all."""
    told = PngImagePlugin.PngInfo()
    told.add_itxt("prompt", prompt)
    told.add_itxt("note", note)
    content = io.BytesIO()
    image.save(content, "png", pnginfo=told)
    write_file(path, content.getvalue())


def write_sheet(folder: Path, title: str, images: Sequence[Drawn]) -> Path:
    """Write the page, whole or not at all; return its path."""
    figures = "\n".join(map(_figure, images))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><main>\n{figures}\n</main></html>\n"
    )
    write_file(folder / FILE, page.encode("utf-8", "backslashreplace"))
    return folder / FILE


def _figure(image: Drawn) -> str:
    told = f"{html.escape(image.prompt)}<br><small>{html.escape(f'{image.name}: {image.note}')}"
    if not image.file:
        return f'<figure class="failed">{told}</small></figure>'
    source = html.escape(quote(image.file), quote=True)
    picture = f'<a href="{source}"><img src="{source}" loading="lazy" alt=""></a>'
    return f"<figure>{picture}<figcaption>{told}</small></figcaption></figure>"
