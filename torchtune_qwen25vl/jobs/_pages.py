"""What the pages of jobs have in common: their style, and small images inside them."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from torchtune_qwen25vl.media import load_image

SIZE = (256, 256)  # pixels, at most
STYLE = Path(__file__).with_name("page.css")
MARK = "/* style */"  # in a page, where the style goes


def styled(page: Path) -> str:
    """Read the file of a page, and put the style of all pages in."""
    return page.read_text("utf-8").replace(MARK, STYLE.read_text("utf-8"))


def jpeg_of(image: Image.Image) -> bytes:
    """Make an image small, which changes it, and return it as JPEG."""
    image.thumbnail(SIZE)
    content = BytesIO()
    image.save(content, "JPEG", quality=80)
    return content.getvalue()


def thumbnail(source: Any) -> bytes:
    """Read an image, whatever `load_image` takes, and return it small, as JPEG."""
    return jpeg_of(load_image(source))


def image_tag(jpeg: bytes) -> str:
    """Write a JPEG as an element of a page; nothing is "no image"."""
    if not jpeg:
        return "<i>no image</i>"
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return f'<img loading="lazy" alt="" src="{source}">'
