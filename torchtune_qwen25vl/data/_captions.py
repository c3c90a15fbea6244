"""Pictures with captions: tables, JSON lists, COCO's annotations, folders with .txt sidecars.

Each caption is a row of its own: a picture with five of them is seen five times in an epoch, which
uses all of them in an order that the sampler's seed alone decides.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._parse import listed, required
from torchtune_qwen25vl.media import EXTRA_FIELDS, SUFFIXES, JsonRows, Rows, json_texts

PROMPT = "Describe this image."


@dataclass(frozen=True)
class CaptionParser:
    """Reads a row of one picture and one caption as a question and its answer.

    Attributes:
        prompt: the question, asked after the picture.
        image_column: where the picture is.
        caption_column: where the caption is.
    """

    prompt: str = PROMPT
    image_column: str = "image"
    caption_column: str = "caption"

    def __call__(self, row: dict[str, Any]) -> Conversation:
        if EXTRA_FIELDS in row:
            raise ValueError(
                f"more fields than the header names: {row[EXTRA_FIELDS]}; quote commas"
            )
        image, caption = required(row, self.image_column), required(row, self.caption_column)
        if not isinstance(caption, str):
            raise ValueError(f"a caption is a text, got {type(caption).__name__} {caption!r}")
        question = [{"type": "image", "content": image}, {"type": "text", "content": self.prompt}]
        answer = [{"type": "text", "content": caption}]
        return Conversation([Turn("user", question), Turn("assistant", answer)])


class CaptionRows:
    """Rows of which those with a list of captions count once for each.

    Args:
        rows: as they are stored.
        caption_column: where a caption or a list of them is.
    """

    def __init__(self, rows: Rows, caption_column: str = "caption") -> None:
        counts = [max(1, len(listed(value))) for value in rows.column(caption_column)]
        self._rows, self._column = rows, caption_column
        self._row = np.repeat(np.arange(len(rows)), counts)
        self._which = np.concatenate([np.arange(n) for n in counts] or [self._row])

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[self._row[index]]
        captions = listed(row.get(self._column))
        return {**row, self._column: captions[self._which[index]] if captions else None}

    def column(self, name: str) -> list[Any]:
        values = self._rows.column(name)
        return [values[row] for row in self._row]

    def digest(self, index: int) -> str:
        return f"{self._rows.digest(self._row[index])}-{self._which[index]}"


def coco_rows(source: str) -> JsonRows:
    """Rows of COCO's `captions_*.json`: one for each annotation, in the file's order.

    Raises:
        ValueError: if the file has no images and annotations, or an annotation has no image.
    """
    content = json.loads(Path(source).read_text("utf-8"))
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"{source}: COCO captions hold 'images' and 'annotations'")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    if strays := [note["id"] for note in content["annotations"] if note["image_id"] not in names]:
        raise ValueError(f"{source}: annotations {strays[:5]} belong to none of its images")
    rows = [
        {"image": names[n["image_id"]], "caption": n["caption"]} for n in content["annotations"]
    ]
    return JsonRows(json_texts(rows))


class FolderRows(JsonRows):
    """The pictures in a folder and its subfolders, by path, with the text of the .txt beside each.

    A text loses the newlines at its end, nothing else.

    Args:
        source: the folder.

    Raises:
        ValueError: if it holds no pictures.
    """

    def __init__(self, source: str) -> None:
        self._folder = Path(source)
        files = sorted(self._folder.rglob("[!.]*"))
        pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not pictures:
            raise ValueError(f"{source}: no pictures ({' '.join(SUFFIXES)}) in this folder")
        super().__init__(json_texts({"image": str(picture)} for picture in pictures))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The row, its caption read now: a picture without a text is that row's error."""
        row = super().__getitem__(index)
        sidecar = Path(row["image"]).with_suffix(".txt")
        if not sidecar.is_file():
            raise ValueError(f"{row['image']} has no {sidecar.name} beside it")
        return {**row, "caption": sidecar.read_text("utf-8-sig").rstrip("\r\n")}
