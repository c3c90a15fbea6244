"""Images with captions: tables, JSON lists, folders with .txt sidecars.

Each caption is a row of its own: a picture with five of them is seen five times in an epoch, which
uses all of them in an order that the sampler's seed alone decides.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data.formats._shared import listed, opened, required
from torchtune_qwen25vl.media import EXTRA_FIELDS, SUFFIXES, JsonRows, Rows, json_texts
from torchtune_qwen25vl.transform import Qwen25VLTransform

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


def caption_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    image_column: str = "image",
    caption_column: str = "caption",
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """Pictures with a caption, or a list of captions each of which is a sample, in a table or list.

    Args:
        model_transform: the recipe's tokenizer.
        source: a .csv or .tsv file with a header, a .jsonl or .json file, or another that
            `open_rows` takes.
        image_column: where the pictures are.
        caption_column: where the captions are.
        prompt: what the user asks, after the picture.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    rows, common = opened(source, options)
    parse = CaptionParser(prompt, image_column, caption_column)
    rows = CaptionRows(rows, caption_column)
    return sample_dataset(model_transform, rows, parse, source=source, **common)


def caption_folder_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """A folder of pictures, subfolders included, with a .txt of the same name beside each.

    Args:
        model_transform: the recipe's tokenizer.
        source: the folder.
        prompt: what the user asks, after the picture.
        **options: `Options`.

    Raises:
        ValueError: if it holds no pictures or an option cannot be; a bad row raises when read.
    """
    rows, parse = FolderRows(source), CaptionParser(prompt)
    return sample_dataset(model_transform, rows, parse, source=source, **options)
