"""Questions to answers, in batches; when memory runs out, in smaller ones."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from torchtune_qwen25vl.captioning._prompts import Preset
from torchtune_qwen25vl.generation import NotFiniteError, generate, prompt_batch
from torchtune_qwen25vl.jobs import InHalves, seeded
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import PLACEHOLDER_PIXELS, Qwen25VLTransform

logger = logging.getLogger(__name__)

Finish = Literal["done", "cut", "looped", "failed"]
LOOP_TOKENS, LOOP_TIMES = 24, 4  # an answer loops when it ends in 4 repeats, 24 tokens or more


@dataclass(frozen=True)
class Question:
    """One image and what is asked about it, ready for the model.

    Attributes:
        name: of the item
        sample: the conversation as `Qwen25VLTransform` returns it
        max_pixels: limit the image was resized to
        steps: what was done so that memory holds it, in words
    """

    name: str
    sample: dict[str, Any]
    max_pixels: int
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said about one image, or the reason why it did not."""

    question: Question
    state: Finish
    text: str = ""
    tokens: int = 0
    reason: str = ""
    is_finite: bool = True


class Answerer:
    """Ask a model about batches of images.

    Rows of a batch do not see each other, so an answer is the one that the image gets alone. When
    memory runs out a batch is halved, and an image that does not fit alone is made smaller.

    Args:
        model: in evaluation mode, on its device
        transform: decodes answers
        preset: length and sampling of answers
        seed: seed of the sampling
        shrunk: makes the question of an image anew, with at most so many pixels
        min_pixels: the limit of an image is never set below it
    """

    def __init__(
        self,
        model: Qwen25VL,
        transform: Qwen25VLTransform,
        preset: Preset,
        *,
        seed: int,
        shrunk: Callable[[Question, int], Question],
        min_pixels: int,
    ) -> None:
        self._model, self._transform, self._preset = model, transform, preset
        self._seed, self._shrunk, self._min_pixels = seed, shrunk, min_pixels
        self._in_halves = InHalves[Question, Answer](
            self._generate,
            refused=_refused,
            too_large=self._smaller,
            halved=lambda question, step: replace(question, steps=(*question.steps, step)),
        )

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions, in their order; one that fails fails alone.

        Raises:
            RuntimeError: of the device, other than that memory ran out.
        """
        return self._in_halves(questions, self._model.device)

    def _generate(self, questions: Sequence[Question]) -> list[Answer]:
        device = self._model.device
        preset = self._preset
        generation = generate(
            self._model,
            self._batch(questions, device),
            max_new_tokens=preset.max_new_tokens,
            temperature=preset.temperature,
            top_k=preset.top_k,
            top_p=preset.top_p,
            repetition_penalty=preset.repetition_penalty,
            stop_tokens=self._transform.stop_tokens,
            generator=seeded(self._seed, questions[0].name, device),
        )
        rows = [
            row[:length]
            for row, length in zip(generation.tokens.tolist(), generation.lengths, strict=True)
        ]
        return [
            self._answer(*answered)
            for answered in zip(questions, rows, generation.finish_reasons, strict=True)
        ]

    def _batch(self, questions: Sequence[Question], device: torch.device) -> dict[str, Any]:
        samples = [question.sample for question in questions]
        return prompt_batch(samples, self._transform.pad_id, device=device)

    def _answer(self, question: Question, tokens: list[int], finish: str) -> Answer:
        said = tokens[:-1] if finish == "stop" else tokens
        text = self._transform.decode(said).strip()
        if not text:
            return Answer(question, "failed", tokens=len(tokens), reason="the answer is empty")
        state: Finish = "looped" if loops(said) else "done" if finish == "stop" else "cut"
        return Answer(question, state, text, len(tokens))

    def _smaller(self, question: Question) -> Answer:
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
        return self([replace(smaller, steps=(*question.steps, step))])[0]


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
