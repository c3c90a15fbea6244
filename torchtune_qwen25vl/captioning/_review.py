"""A page to look through captions: one HTML file that holds everything it shows.

The page filters by state and text; captions can be edited in it and saved as JSON lines.
"""

import base64
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.captioning._records import Record
from torchtune_qwen25vl.captioning._tables import as_row
from torchtune_qwen25vl.jobs import Item, Outcome, Workers, read_task
from torchtune_qwen25vl.media import load_image

PAGE = Path(__file__).with_name("review.html")
MARK = "<!-- rows -->"
THUMBNAIL = (256, 256)  # pixels, at most


def write_review(
    path: Path, items: Sequence[Item], records: Sequence[Record], workers: Workers
) -> None:
    """Write the page.

    Args:
        path: of the page
        items: images
        records: how they ended, in the same order
        workers: read the thumbnails
    """
    tasks = (read_task(read_thumbnail, item) for item in items)
    thumbnails = workers.map(tasks, ahead=64)
    before, after = PAGE.read_text("utf-8").split(MARK)
    rows = "".join(_rows(records, thumbnails))
    write_file(path, f"{before}{rows}{after}".encode())


def read_thumbnail(source: Any) -> bytes:
    """Make a JPEG of an image, at most 256 pixels a side."""
    image = load_image(source)
    image.thumbnail(THUMBNAIL)
    file = BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def _rows(records: Iterable[Record], thumbnails: Iterable[Outcome]) -> Iterator[str]:
    for record, thumbnail in zip(records, thumbnails, strict=True):
        row = as_row(record)
        shown = {key: row[key] for key in ("image", "state", "caption", "reason", "steps")}
        data = html.escape(json.dumps(shown, ensure_ascii=False))
        source = ""
        if thumbnail.value:
            source = f"data:image/jpeg;base64,{base64.b64encode(thumbnail.value).decode()}"
        image = f'<img loading="lazy" alt="" src="{source}">' if source else "<i>no image</i>"
        yield (
            f'<article data-row="{data}">{image}<div><h2>{html.escape(str(row["image"]))}</h2>'
            f'<p class="state {row["state"]}">{row["state"]} <span>{html.escape(_note(row))}</span>'
            f'</p><textarea spellcheck="false">{html.escape(str(row["caption"]))}</textarea>'
            "</div></article>\n"
        )


def _note(row: dict[str, str | int]) -> str:
    return "; ".join(str(row[key]) for key in ("reason", "steps") if row[key])
