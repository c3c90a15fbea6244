"""Images with captions: tables, JSON lists, folders with .txt sidecars.

Each caption is a row of its own: an image with five of them is seen five times in an epoch, which
uses all of them in an order that the sampler's seed alone decides.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchtune.utils import get_logger, log_rank_zero

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data.formats._shared import listed, opened, refuse_option, required
from torchtune_qwen25vl.media import (
    EXTRA_FIELDS,
    SUFFIXES,
    JsonRows,
    Rows,
    SelectedRows,
    Sieve,
    StreamRows,
    images_in,
    json_texts,
    numbers_of_split,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform

PROMPT = "Describe this image."
SHOWN_FIRST = "the image of a caption is shown first in any case"


@dataclass(frozen=True)
class CaptionParser:
    """The parser of rows of one image and one caption: a question and its answer.

    Attributes:
        prompt: question, asked after the image
        image_column: column of the image
        caption_column: column of the caption
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
        if isinstance(caption, list):  # of a stream; other rows are listed by `CaptionRows`
            if len(caption) > 1:
                raise ValueError(
                    f"a row of a stream is one sample, with one caption, got {len(caption)}; leave "
                    "streaming out"
                )
            (caption,) = caption
        if not isinstance(caption, str):
            raise ValueError(f"a caption is a text, got {type(caption).__name__} {caption!r}")
        question = [{"type": "image", "content": image}, {"type": "text", "content": self.prompt}]
        answer = [{"type": "text", "content": caption}]
        return Conversation([Turn("user", question), Turn("assistant", answer)])


class CaptionRows:
    """Rows of which those with a list of captions count once for each.

    Args:
        rows: rows as they are stored
        caption_column: column of a caption or a list of them
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
    """The images in a folder and its subfolders, by path, with the text of the file beside each.

    They are those that `caption` works on, and what is left out is logged as it does. The text of
    a.jpg is in a.jpg.txt, or else in a.txt. It loses the newlines at its end, nothing else.

    Args:
        source: folder, whose subfolders are included
        text_suffix: of the texts

    Raises:
        ValueError: if it holds no images, or a folder cannot be read.
    """

    def __init__(self, source: str, text_suffix: str = ".txt") -> None:
        self._suffix, sieve = text_suffix, Sieve(text_suffix=text_suffix)
        folder = Path(source).absolute()  # not relative to media_root
        images = sorted(images_in(folder, sieve, recursive=True, report=_refuse_folder))
        if not images:
            raise ValueError(f"{source}: no images ({' '.join(SUFFIXES)}) in this folder")
        if sieve.left_out:
            log_rank_zero(get_logger("INFO"), f"{source}: left out {sieve}")
        super().__init__(json_texts({"image": str(image)} for image in images))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the row, its caption read now: an image without a text is that row's error."""
        row = super().__getitem__(index)
        image = Path(row["image"])
        full, sidecar = Path(f"{image}{self._suffix}"), image.with_suffix(self._suffix)
        if full.is_file():
            sidecar = full
        elif not sidecar.is_file():
            raise ValueError(f"{image} has no {sidecar.name} beside it")
        return {**row, "caption": sidecar.read_text("utf-8-sig").rstrip("\r\n")}


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"{error.filename}: the folder cannot be read: {error.strerror}")


def caption_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    image_column: str = "image",
    caption_column: str = "caption",
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of a table or list of images with a caption, or with several, each a sample.

    Args:
        model_transform: tokenizer of the recipe
        source: a .csv or .tsv file with a header, a .jsonl or .json file, or another that
            `open_rows` takes
        image_column: column of the images
        caption_column: column of the captions
        prompt: question of the user, after the image
        **options: `Options`, and arguments of `datasets.load_dataset`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    refuse_option(options, "prepend_media", SHOWN_FIRST)
    rows, common = opened(source, options)
    parse = CaptionParser(prompt, image_column, caption_column)
    if not isinstance(rows, StreamRows):  # whose rows are samples, one after the other
        rows = CaptionRows(rows, caption_column)
    split = options.get("split")
    return sample_dataset(model_transform, rows, parse, source=source, split=split, **common)


def caption_folder_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    prompt: str = PROMPT,
    text_suffix: str = ".txt",
    split: str | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of a folder of images, with a text file of the same name beside each.

    Args:
        model_transform: tokenizer of the recipe
        source: folder, whose subfolders are included
        prompt: question of the user, after the image
        text_suffix: suffix of the text files, as in `caption`
        split: part of the images by path, such as train[:95%]
        **options: `Options`

    Raises:
        ValueError: if it holds no images or an option cannot be; a bad row raises when read.
    """
    refuse_option(options, "prepend_media", SHOWN_FIRST)
    refuse_option(options, "media_root", "the images are those in the folder")
    every, parse = FolderRows(source, text_suffix), CaptionParser(prompt)
    rows = SelectedRows(every, numbers_of_split(source, split, len(every)))
    return sample_dataset(model_transform, rows, parse, source=source, split=split, **options)
