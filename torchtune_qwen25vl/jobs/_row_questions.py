"""Rows to questions for the model, their images read by worker processes ahead of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torchtune.data import Message
from tqdm import tqdm

from torchtune_qwen25vl.jobs._answers import Question
from torchtune_qwen25vl.jobs._images import read_pixels, tokens_of
from torchtune_qwen25vl.jobs._table_rows import Held, Row
from torchtune_qwen25vl.jobs._workers import Outcome, Task, Workers, attempt
from torchtune_qwen25vl.media import load_image
from torchtune_qwen25vl.transform import Qwen25VLTransform

Size = tuple[int, int]  # height and width in pixels


class Asking(Protocol):
    """What is asked about a row."""

    @property
    def system_prompt(self) -> str | None: ...

    @property
    def min_pixels(self) -> int | None: ...

    def question(self, row: Row) -> str: ...


@dataclass(frozen=True, kw_only=True)
class RowQuestion(Question):
    """A row, and the sample that the transform made of it.

    Attributes:
        row: what was asked about
        sizes: size of each of its images, as it is stored and as the model sees it
    """

    row: Row
    sizes: tuple[tuple[Size, Size], ...]


@dataclass(frozen=True)
class RowBatch:
    """Questions that go through the model together, and why other rows have none, by name."""

    questions: list[RowQuestion]
    problems: dict[str, str]


class RowQuestioner:
    """Make questions of rows.

    Args:
        transform: the model's, from messages to samples
        asking: what is asked; the checkpoint's own min_pixels count where it has none
        max_pixels: images of more pixels are shrunk
    """

    def __init__(self, transform: Qwen25VLTransform, asking: Asking, *, max_pixels: int) -> None:
        self._transform, self._asking = transform, asking
        self._limits = asking.min_pixels or transform.min_pixels, max_pixels

    def count_tokens(self, rows: Sequence[Row], workers: Workers) -> dict[str, Outcome]:
        """Count the tokens of prompts, by the headers of their images, behind a progress bar.

        Returns:
            For each name the number of tokens, or why there is none.
        """
        tasks = (_task(_count, row, self._limits) for row in rows)
        counts = workers.map(tasks, ahead=256)
        bar = tqdm(counts, "reading headers", len(rows), unit="row", leave=False)
        return {row.name: self._with_text(row, count) for row, count in zip(rows, bar, strict=True)}

    def _with_text(self, row: Row, count: Outcome) -> Outcome:
        if count.problem:
            return count
        return attempt(Task(self._length, (row, count.value)))

    def _length(self, row: Row, placeholders: int) -> int:
        return placeholders + len(self._sample(row, [])["tokens"])

    def batches(
        self, batches: Iterable[Sequence[Row]], workers: Workers, ahead: int
    ) -> Iterator[RowBatch]:
        """Make the questions of batch after batch, `ahead` rows being read beforehand."""
        batches = list(batches)
        tasks = (_task(_read, row, self._limits) for batch in batches for row in batch)
        outcomes = workers.map(tasks, ahead=ahead)
        for batch in batches:
            yield self._batch(batch, [next(outcomes) for _ in batch])

    def _batch(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> RowBatch:
        batch = RowBatch([], {})
        for row, outcome in zip(rows, outcomes, strict=True):
            if not outcome.problem:
                outcome = attempt(Task(self._question, (row, outcome.value)))
            if outcome.problem:
                batch.problems[row.name] = outcome.problem
            else:
                batch.questions.append(outcome.value)
        return batch

    def _question(self, row: Row, read: Sequence[tuple[np.ndarray, Size]]) -> RowQuestion:
        images = [image for image, _ in read]
        sizes = tuple((size, image.shape[:2]) for image, size in read)
        sample = self._sample(row, images)
        return RowQuestion(row.name, sample, self._limits[1], row=row, sizes=sizes)

    def _sample(self, row: Row, images: Sequence[np.ndarray]) -> dict[str, Any]:
        content = [{"type": "image", "content": image, "resized": True} for image in images]
        content.append({"type": "text", "content": self._asking.question(row)})
        messages = [Message("user", content)]
        if self._asking.system_prompt is not None:
            messages.insert(0, Message("system", self._asking.system_prompt))
        return self._transform({"messages": messages}, inference=True)


def sources_of(row: Row) -> list[Any]:
    """Return what `load_image` takes for each image of a row; those inside a table are read.

    Raises:
        ValueError: if the row of the table is damaged.
    """
    return [source.read() if isinstance(source, Held) else source for source in row.sources]


def _task(
    function: Callable[[Sequence[Any], int, int], Any], row: Row, limits: tuple[int, int]
) -> Task:
    """Make a task on the images of a row; those inside a table are read here."""
    if row.problem:
        return Task(_refuse, (row.problem,))
    read = attempt(Task(sources_of, (row,)))
    return Task(_refuse, (read.problem,)) if read.problem else Task(function, (read.value, *limits))


def _refuse(problem: str) -> None:
    raise ValueError(problem)


def _count(sources: Sequence[Any], min_pixels: int, max_pixels: int) -> int:
    return sum(tokens_of(source, min_pixels, max_pixels) for source in sources)


def _read(
    sources: Sequence[Any], min_pixels: int, max_pixels: int
) -> list[tuple[np.ndarray, Size]]:
    """Read images as the model will see them, each with the size it is stored in."""
    images = map(load_image, sources)
    return [
        (read_pixels(image, min_pixels, max_pixels), (image.height, image.width))
        for image in images
    ]
