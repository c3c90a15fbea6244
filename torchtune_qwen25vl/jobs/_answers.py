"""Questions to answers, many in flight at a time; when memory runs out, in smaller batches."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torchtune_qwen25vl.device import is_out_of_memory, release_cache
from torchtune_qwen25vl.generation import Ended, NotFiniteError, Prompt, RunningBatch, Sampling
from torchtune_qwen25vl.jobs._chance import seeded
from torchtune_qwen25vl.jobs._halves import InHalves
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import PLACEHOLDER_PIXELS, Qwen25VLTransform

logger = logging.getLogger(__name__)

Finish = Literal["done", "cut", "looped", "failed"]
LOOP_TOKENS, LOOP_TIMES = 24, 4  # an answer loops when it ends in 4 repeats, 24 tokens or more
WORTHWHILE = 4  # questions enter together, as a quarter of those then in flight: see `Answerer`


@dataclass(frozen=True)
class Question:
    """A prompt, ready for the model.

    Attributes:
        name: of the item
        sample: the conversation as `Qwen25VLTransform` returns it
        max_pixels: limit its images were resized to
        steps: what was done so that memory holds it, in words
    """

    name: str
    sample: dict[str, Any]
    max_pixels: int
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said to one question, or the reason why it did not; it may say nothing."""

    question: Question
    state: Finish
    text: str = ""
    tokens: int = 0
    reason: str = ""
    is_finite: bool = True


class Manner(Protocol):
    """How answers are given: their length, and how their tokens are chosen."""

    @property
    def max_new_tokens(self) -> int: ...

    @property
    def sampling(self) -> Sampling: ...


class Answerer:
    """Ask a model about images.

    A question whose answer has ended gives its place to the next one. Questions in flight do not
    see each other, and each draws from a chance of its own, so an answer is the one that the
    question gets alone. Where memory runs out, or a question is refused, those in flight are
    answered anew: in halves, one by one, and one that does not fit alone has its images made
    smaller, where that is allowed.

    The prompts that enter are read in one forward, and a place that waits for company is empty.
    Questions enter once they are a quarter of all that will then be in flight: 512 answers of
    14 to 128 tokens in 32 places take 60 such forwards and 987 steps of one token. Entering each at
    once they take 363 and 893, in batches that wait for their longest answer 16 and 1661.

    Args:
        model: in evaluation mode, on its device
        transform: decodes answers
        manner: length and sampling of answers
        seed: seed of the sampling
        batch_size: most questions in flight
        batch_tokens: most tokens in flight, padding and answers included; one always fits
        shrunk: makes a question anew, with images of at most so many pixels; None where an answer
            counts only for those it was asked with
        min_pixels: the limit of images is never set below it
    """

    def __init__(
        self,
        model: Qwen25VL,
        transform: Qwen25VLTransform,
        manner: Manner,
        *,
        seed: int,
        batch_size: int,
        batch_tokens: int,
        shrunk: Callable[[Question, int], Question] | None = None,
        min_pixels: int = 1,
    ) -> None:
        self._model, self._transform, self._manner = model, transform, manner
        self._seed, self._shrunk, self._min_pixels = seed, shrunk, min_pixels
        self._batch_size, self._batch_tokens = batch_size, batch_tokens
        self._device = model.device
        self._in_halves = InHalves[Question, Answer](
            self._together,
            refused=_refused,
            too_large=self._smaller,
            halved=lambda question, step: replace(question, steps=(*question.steps, step)),
        )

    def __call__(self, batches: Iterable[Sequence[Question]]) -> Iterator[list[Answer]]:
        """Answer the questions of all batches; yield those that ended together, as they end.

        Questions enter in their order. A batch is asked for when there are places for it, and is
        waited for: what is in flight together depends on answers alone, never on time.

        Raises:
            RuntimeError: of the device, other than that memory ran out.
        """
        batches, running = iter(batches), self._start()
        waiting, entering = deque[Question](), list[Question]()
        while True:
            in_flight = running.questions
            while waiting and self._fits([*in_flight, *entering, waiting[0]]):
                entering.append(waiting.popleft())
            enough = len(entering) > 0 and len(in_flight) <= (WORTHWHILE - 1) * len(entering)
            if not (enough or waiting) and (batch := next(batches, None)) is not None:
                waiting.extend(batch)
                continue
            if not (in_flight or entering):
                return
            new: list[Question] = []
            if enough or not waiting:  # not even the last batch has more
                new, entering = entering, new
            if (ended := self._go_on(running, new)) is None:
                running = self._start()
                release_cache(self._device)
                ended = self._in_halves([*in_flight, *new], self._device)
            yield ended

    def _fits(self, questions: Sequence[Question]) -> bool:
        """Whether questions may be in flight together."""
        prompt = max(len(question.sample["tokens"]) for question in questions)
        tokens = len(questions) * (prompt + self._manner.max_new_tokens)
        fits = len(questions) <= self._batch_size and tokens <= self._batch_tokens
        return fits or len(questions) == 1

    def _start(self) -> RunningBatch[Question]:
        return RunningBatch(
            self._model,
            self._transform.pad_id,
            self._manner.sampling,
            max_new_tokens=self._manner.max_new_tokens,
            stop_tokens=self._transform.stop_tokens,
        )

    def _go_on(
        self, running: RunningBatch[Question], new: Sequence[Question]
    ) -> list[Answer] | None:
        """Let questions enter, and go on until some have ended; None where that is not possible."""
        try:
            return self._step(running, new)
        except ValueError:  # one row has the problem
            return None
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        logger.warning("out of memory: those in flight are answered anew")
        return None

    def _together(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions that enter at once, in their order."""
        running = self._start()
        answers = self._step(running, questions)
        while running.questions:
            answers += self._step(running, ())
        of_name = {answer.question.name: answer for answer in answers}
        return [of_name[question.name] for question in questions]

    def _step(self, running: RunningBatch[Question], new: Sequence[Question]) -> list[Answer]:
        if new:
            running.enter([self._prompt(question) for question in new])
        return [self._answer(ended) for ended in running.advance()]

    def _prompt(self, question: Question) -> Prompt[Question]:
        generator = seeded(self._seed, question.name, self._device)
        return Prompt(question, question.sample, generator)

    def _answer(self, ended: Ended[Question]) -> Answer:
        question, tokens, finish, _ = ended
        said = tokens[:-1] if finish == "stop" else tokens
        text = self._transform.decode(said).strip()
        state: Finish = "looped" if loops(said) else "done" if finish == "stop" else "cut"
        return Answer(question, state, text, len(tokens))

    def _smaller(self, question: Question) -> Answer:
        if self._shrunk is None:
            reason = "out of memory with this row alone: lower max_pixels"
            return Answer(question, "failed", reason=reason)
        before = question.max_pixels
        after = max(self._min_pixels, before // 2 // PLACEHOLDER_PIXELS * PLACEHOLDER_PIXELS)
        if after >= before:
            reason = f"out of memory with max_pixels {before}, the least there may be"
            return Answer(question, "failed", reason=reason)
        step = f"max_pixels {before} -> {after}"
        logger.warning("%s: out of memory alone, %s", ascii(question.name), step)
        try:
            smaller = self._shrunk(question, after)
        except ValueError as error:
            return Answer(question, "failed", reason=str(error))
        again = replace(smaller, steps=(*question.steps, step))
        return self._in_halves([again], self._device)[0]


def _refused(question: Question, error: ValueError) -> Answer:
    is_finite = not isinstance(error, NotFiniteError)
    return Answer(question, "failed", reason=str(error), is_finite=is_finite)


def loops(tokens: Sequence[int]) -> bool:
    """Whether an answer ends in repetition: one piece, 4 times in a row or more, 24 tokens long."""
    for period in range(1, len(tokens) // LOOP_TIMES + 1):
        span = max(LOOP_TIMES * period, LOOP_TOKENS)
        tail = tokens[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    return False
