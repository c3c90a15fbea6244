"""Images to questions for the model, read by worker processes ahead of it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtune.data import Message

from torchtune_qwen25vl.captioning._prompts import Wording, variables_of
from torchtune_qwen25vl.captioning._thumbnails import Thumbnails, read_for_model
from torchtune_qwen25vl.jobs import (
    Item,
    Outcome,
    Question,
    Task,
    Workers,
    attempt,
    read_task,
)
from torchtune_qwen25vl.transform import Qwen25VLTransform


@dataclass(frozen=True)
class Batch:
    """Questions that go through the model together.

    Attributes:
        questions: those whose image could be read
        problems: why the other images have no question, by name of the item
    """

    questions: list[Question]
    problems: dict[str, str]


class Questioner:
    """Make questions of items.

    Args:
        transform: the model's, from messages to samples
        wording: what is asked
        existing: captions that images have already, by name of the item
        min_pixels: images of fewer pixels are enlarged
        max_pixels: images of more pixels are shrunk
        thumbnails: are made of images that are read; None for none
    """

    def __init__(
        self,
        transform: Qwen25VLTransform,
        wording: Wording,
        existing: Mapping[str, str],
        *,
        min_pixels: int,
        max_pixels: int,
        thumbnails: Thumbnails | None = None,
    ) -> None:
        self._transform, self._wording, self._existing = transform, wording, existing
        self._min_pixels, self._max_pixels = min_pixels, max_pixels
        self._thumbnails = thumbnails

    def batches(
        self, batches: Iterable[Sequence[Item]], workers: Workers, ahead: int
    ) -> Iterator[Batch]:
        """Make the questions of batch after batch, `ahead` images being read beforehand."""
        batches = list(batches)
        tasks = (self._task(item, self._max_pixels) for batch in batches for item in batch)
        outcomes = workers.map(tasks, ahead=ahead)
        for batch in batches:
            yield self._batch(batch, [next(outcomes) for _ in batch])

    def again(self, item: Item, max_pixels: int) -> Question:
        """Make the question of an item anew, with fewer pixels.

        Raises:
            ValueError: if its image cannot be read any more.
        """
        outcome = attempt(self._task(item, max_pixels))
        if outcome.problem:
            raise ValueError(outcome.problem)
        return self._question(item, outcome.value, max_pixels)

    def _task(self, item: Item, max_pixels: int) -> Task:
        thumbnail = self._thumbnails.path(item) if self._thumbnails else None
        return read_task(read_for_model, item, self._min_pixels, max_pixels, thumbnail)

    def _batch(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> Batch:
        batch = Batch([], {})
        for item, outcome in zip(items, outcomes, strict=True):
            if not outcome.problem:
                task = Task(self._question, (item, outcome.value, self._max_pixels))
                outcome = attempt(task)
            if outcome.problem:
                batch.problems[item.name] = outcome.problem
            else:
                batch.questions.append(outcome.value)
        return batch

    def _question(self, item: Item, pixels: Any, max_pixels: int) -> Question:
        variables = variables_of(item, self._existing.get(item.name, ""))
        content = [
            {"type": "image", "content": pixels, "resized": True},
            {"type": "text", "content": self._wording.question(variables)},
        ]
        messages = [Message("user", content)]
        if self._wording.system is not None:
            messages.insert(0, Message("system", self._wording.system))
        sample = self._transform({"messages": messages}, inference=True)
        return Question(item.name, sample, max_pixels)
