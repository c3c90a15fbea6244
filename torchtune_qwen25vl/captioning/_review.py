"""A page to look through captions: one HTML file that holds everything it shows.

The page filters by state and text; captions can be edited in it and saved as JSON lines.
"""

import html
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.captioning._records import Record
from torchtune_qwen25vl.captioning._tables import as_row
from torchtune_qwen25vl.jobs import image_tag, styled

PAGE = Path(__file__).with_name("review.html")
MARK = "<!-- rows -->"


def write_review(path: Path, records: Sequence[Record], thumbnails: Iterable[bytes]) -> None:
    """Write the page.

    Args:
        path: of the page
        records: how images ended
        thumbnails: JPEG of each, or nothing, in the same order
    """
    before, after = styled(PAGE).split(MARK)
    rows = "".join(_rows(records, thumbnails))
    write_file(path, f"{before}{rows}{after}".encode())


def _rows(records: Iterable[Record], thumbnails: Iterable[bytes]) -> Iterator[str]:
    for record, thumbnail in zip(records, thumbnails, strict=True):
        row = as_row(record)
        shown = {key: row[key] for key in ("image", "state", "caption", "reason", "steps")}
        data = html.escape(json.dumps(shown, ensure_ascii=False))
        yield (
            f'<article data-row="{data}">{image_tag(thumbnail)}'
            f"<div><h2>{html.escape(str(row['image']))}</h2>"
            f'<p class="state {row["state"]}">{row["state"]} <span>{html.escape(_note(row))}</span>'
            f'</p><textarea spellcheck="false">{html.escape(str(row["caption"]))}</textarea>'
            "</div></article>\n"
        )


def _note(row: dict[str, str | int]) -> str:
    return "; ".join(str(row[key]) for key in ("reason", "steps") if row[key])
