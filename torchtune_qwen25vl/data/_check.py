"""Every row read as training would read it: what it was, or why it cannot be trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from torchtune_qwen25vl._torchtune import labelled_rows
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.media import StreamRows
from torchtune_qwen25vl.transform import (
    PATCHES_PER_PLACEHOLDER,
    PLACEHOLDER_PIXELS,
    SkipSample,
    written_names,
)


@dataclass(frozen=True)
class Sound:
    """A row that can be trained on.

    Attributes:
        tokens: number of tokens, all kinds together
        labelled: number of tokens that are trained on
        visual: number of placeholders of images and videos
        pixels: pixels of each image after resizing, and of all frame groups of each video
        names: names of Qwen's tokens that are written out in its answers
        weighted: whether a label has a weight other than 1
    """

    tokens: int
    labelled: int
    visual: int
    pixels: tuple[int, ...]
    names: tuple[str, ...]
    weighted: bool = False


@dataclass(frozen=True)
class Bad:
    """A row that cannot be trained on.

    Attributes:
        row: number of the row, counted from 0
        kind: "bad", or "skipped" where the transform was told to skip such rows
        error: what is wrong with it
        digest: name of its content, by which a changed row is noticed later
    """

    row: int
    kind: str
    error: str
    digest: str


def check_rows(dataset: SampleDataset, *, num_workers: int) -> tuple[list[Sound], list[Bad]]:
    """Read all rows of a dataset, with a progress bar.

    Args:
        dataset: dataset as a recipe would build it, none of its rows left out
        num_workers: number of processes that read; with 0, this one reads
    """
    sound: list[Sound] = []
    bad: list[Bad] = []
    with tqdm(_records(dataset, num_workers), total=len(dataset), unit="row") as bar:
        bar.set_description(dataset.source)
        for record in bar:
            if isinstance(record, Sound):
                sound.append(record)
            else:
                bad.append(record)
                bar.set_postfix(bad=len(bad))
    return sound, bad


def trained_tokens(sample: dict[str, Any]) -> Tensor:
    """Return which tokens of a dataset's sample are trained on, bool [s]."""
    labels = torch.as_tensor(np.asarray(sample["labels"]))
    predicting = labelled_rows(labels.unsqueeze(0))[0]  # each the token after it
    return F.pad(predicting[:-1], (1, 0))


def _records(dataset: SampleDataset, num_workers: int) -> Iterator[Sound | Bad]:
    keys: Iterable[Any] = range(len(dataset))
    if isinstance(rows := dataset.rows, StreamRows):  # read here, for the workers
        keys = ((row, rows.fetch(row, row)) for row in range(len(rows)))
    checked = _Checked(dataset)
    return iter(DataLoader(checked, batch_size=None, sampler=keys, num_workers=num_workers))


class _Checked(Dataset):
    """What became of each row, small enough to send from a worker process."""

    def __init__(self, dataset: SampleDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: Any) -> Sound | Bad:
        index = key
        if isinstance(rows := self._dataset.rows, StreamRows):
            rows.hand(*key)
            index, _ = key
        try:
            return _measure(self._dataset[index], self._dataset.answers(index))
        except Exception as error:  # whatever it is, it would have ended a training run
            kind = "skipped" if isinstance(error, SkipSample) else "bad"
            text = f"{error}" if isinstance(error, ValueError) else repr(error)
            return Bad(index, kind, text, self._dataset.rows.digest(index))


def _measure(sample: dict[str, Any], answers: list[str]) -> Sound:
    vision = sample.get("encoder_input", {}).get("vision")
    grids = vision["grid_thw"].tolist() if vision else []
    placeholders = [t * h * w // PATCHES_PER_PLACEHOLDER for t, h, w in grids]
    return Sound(
        tokens=len(sample["tokens"]),
        labelled=int(trained_tokens(sample).sum()),
        visual=sum(placeholders),
        pixels=tuple(PLACEHOLDER_PIXELS * count for count in placeholders),
        names=tuple(name for answer in answers for name in written_names(answer)),
        weighted="label_weights" in sample,
    )
