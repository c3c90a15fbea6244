"""Rows to questions for the model, their images read by worker processes ahead of it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torchtune.data import Message
from tqdm import tqdm

from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.jobs import (
    Held,
    Outcome,
    Row,
    Task,
    Workers,
    attempt,
    read_pixels,
    tokens_of,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform


@dataclass(frozen=True)
class Question:
    """A row, and the sample that the transform made of it."""

    row: Row
    sample: dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Questions that go through the model together, and why other rows have none, by name."""

    questions: list[Question]
    problems: dict[str, str]


class Questioner:
    """Make questions of rows.

    Args:
        transform: the model's, from messages to samples
        settings: what is asked
        max_pixels: images of more pixels are shrunk
    """

    def __init__(
        self, transform: Qwen25VLTransform, settings: Settings, *, max_pixels: int
    ) -> None:
        self._transform, self._settings = transform, settings
        self._limits = settings.min_pixels or transform.min_pixels, max_pixels

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
    ) -> Iterator[Batch]:
        """Make the questions of batch after batch, `ahead` rows being read beforehand."""
        batches = list(batches)
        tasks = (_task(_read, row, self._limits) for batch in batches for row in batch)
        outcomes = workers.map(tasks, ahead=ahead)
        for batch in batches:
            yield self._batch(batch, [next(outcomes) for _ in batch])

    def _batch(self, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> Batch:
        batch = Batch([], {})
        for row, outcome in zip(rows, outcomes, strict=True):
            if not outcome.problem:
                outcome = attempt(Task(self._sample, (row, outcome.value)))
            if outcome.problem:
                batch.problems[row.name] = outcome.problem
            else:
                batch.questions.append(Question(row, outcome.value))
        return batch

    def _sample(self, row: Row, images: Sequence[np.ndarray]) -> dict[str, Any]:
        content = [{"type": "image", "content": image, "resized": True} for image in images]
        content.append({"type": "text", "content": self._settings.question(row)})
        messages = [Message("user", content)]
        if self._settings.system_prompt is not None:
            messages.insert(0, Message("system", self._settings.system_prompt))
        return self._transform({"messages": messages}, inference=True)


def _task(
    function: Callable[[Sequence[Any], int, int], Any], row: Row, limits: tuple[int, int]
) -> Task:
    """Make a task on the images of a row; those inside a table are read here."""
    if row.problem:
        return Task(_refuse, (row.problem,))
    read = attempt(Task(_sources, (row,)))
    return Task(_refuse, (read.problem,)) if read.problem else Task(function, (read.value, *limits))


def _sources(row: Row) -> list[Any]:
    return [source.read() if isinstance(source, Held) else source for source in row.sources]


def _refuse(problem: str) -> None:
    raise ValueError(problem)


def _count(sources: Sequence[Any], min_pixels: int, max_pixels: int) -> int:
    return sum(tokens_of(source, min_pixels, max_pixels) for source in sources)


def _read(sources: Sequence[Any], min_pixels: int, max_pixels: int) -> list[np.ndarray]:
    return [read_pixels(source, min_pixels, max_pixels) for source in sources]
