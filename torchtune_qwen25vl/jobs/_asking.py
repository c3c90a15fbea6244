"""The loop of a job that asks a model: batches that are read ahead, and what came of each."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from torchtune_qwen25vl.jobs._halves import refuse_nan

Q = TypeVar("Q", covariant=True)


class Batch(Protocol[Q]):
    """What is read of a batch: its questions, and why the others are not asked, by name."""

    @property
    def questions(self) -> Sequence[Q]: ...

    @property
    def problems(self) -> Mapping[str, str]: ...


class Said(Protocol):
    """What a model gave for one question, or the reason why it gave nothing."""

    @property
    def reason(self) -> str: ...

    @property
    def is_finite(self) -> bool: ...


A = TypeVar("A", bound=Said)


def note_answers(
    answerer: Callable[[Iterator[Sequence[Q]]], Iterable[Sequence[A]]],
    batches: Iterable[Batch[Q]],
    note: Callable[[Sequence[A], Mapping[str, str]], None],
    *,
    batch_size: int,
) -> None:
    """Ask the questions of all batches, and note every answer as it comes.

    Args:
        answerer: asks the model
        batches: as they are read
        note: is called with answers, and with the problems of rows that are not asked
        batch_size: answers of which one must be finite

    Raises:
        ValueError: if the model gives nothing but nan and infinities.
    """

    def questions() -> Iterator[Sequence[Q]]:
        for batch in batches:
            note([], batch.problems)
            yield batch.questions

    last: deque[str] = deque(maxlen=batch_size)  # why answers are not finite
    for answers in answerer(questions()):
        note(answers, {})
        last.extend("" if answer.is_finite else answer.reason for answer in answers)
        refuse_nan(last)
