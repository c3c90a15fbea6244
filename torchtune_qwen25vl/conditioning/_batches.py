"""Rows to samples, their images read by worker processes ahead of the model; samples to embeddings.

Shapes: l tokens of a prompt, d width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from torchtune_qwen25vl.conditioning._encoder import PromptEncoder
from torchtune_qwen25vl.conditioning._prompts import PromptSample, prompt_sample
from torchtune_qwen25vl.conditioning._settings import Settings
from torchtune_qwen25vl.conditioning._templates import Task, template_of
from torchtune_qwen25vl.jobs import Held, InHalves, Outcome, Row, Workers, attempt
from torchtune_qwen25vl.jobs import Task as Job
from torchtune_qwen25vl.media import load_image
from torchtune_qwen25vl.transform import Qwen25VLTransform


@dataclass(frozen=True)
class Prompt:
    """A row, and the sample that was made of it."""

    row: Row
    sample: PromptSample


@dataclass(frozen=True)
class Batch:
    """Prompts that are embedded together, and why other rows have none, by name."""

    prompts: list[Prompt] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Embedded:
    """The embeddings [l, d] of a prompt, or the reason why there are none."""

    prompt: Prompt
    embeds: Tensor | None = None
    problem: str = ""
    is_finite: bool = True


class Prompter:
    """Make samples of rows.

    Args:
        transform: the model's
        settings: of the recipe
    """

    def __init__(self, transform: Qwen25VLTransform, settings: Settings) -> None:
        self._transform, self._settings = transform, settings

    def batches(
        self, batches: Iterable[Sequence[Row]], workers: Workers, ahead: int
    ) -> Iterator[Batch]:
        """Make the samples of batch after batch, the images of `ahead` rows being read before."""
        batches = list(batches)
        jobs = (self._job(row) for batch in batches for row in batch)
        outcomes = workers.map(jobs, ahead=ahead)
        for rows in batches:
            batch = Batch()
            for row in rows:
                outcome = next(outcomes)
                if not outcome.problem:
                    outcome = attempt(Job(self._sample, (row, outcome.value)))
                if outcome.problem:
                    batch.problems[row.name] = outcome.problem
                else:
                    batch.prompts.append(Prompt(row, outcome.value))
            yield batch

    def _job(self, row: Row) -> Job:
        """Make a task that reads a row's images; those inside a table are taken from it here."""
        read = Outcome(problem=row.problem) if row.problem else attempt(Job(_sources, (row,)))
        if read.problem:
            return Job(_refuse, (read.problem,))
        return Job(_read, (read.value, self._settings.task, self._settings.resize))

    def _sample(self, row: Row, images: Sequence[np.ndarray]) -> PromptSample:
        settings = self._settings
        return prompt_sample(
            self._transform,
            row.text,
            [Image.fromarray(image) for image in images],
            task=settings.task,
            resize=False,  # it has been done
            max_sequence_length=settings.max_sequence_length,
            compat=settings.compat,
        )


class Embedder:
    """Embed batches of prompts; when memory runs out in halves, and what does not fit fails.

    Args:
        encoder: on its device
        row_tokens: most tokens that go through it at once
    """

    def __init__(self, encoder: PromptEncoder, row_tokens: int) -> None:
        self._encoder, self._row_tokens = encoder, row_tokens
        self._in_halves = InHalves[Prompt, Embedded](
            self._embed,
            refused=lambda prompt, error: Embedded(prompt, problem=str(error)),
            too_large=lambda prompt: Embedded(
                prompt, problem="out of memory with this prompt alone: use fewer images"
            ),
        )

    def __call__(self, prompts: Sequence[Prompt]) -> list[Embedded]:
        """Return the embeddings of all prompts, in their order.

        Raises:
            RuntimeError: of the device, other than that memory ran out.
        """
        return self._in_halves(prompts, self._encoder.device)

    def _embed(self, prompts: Sequence[Prompt]) -> list[Embedded]:
        samples = [prompt.sample for prompt in prompts]
        found = self._encoder.embed(samples, row_tokens=self._row_tokens)
        return [_checked(prompt, embeds) for prompt, embeds in zip(prompts, found, strict=True)]


def _checked(prompt: Prompt, embeds: Tensor) -> Embedded:
    if bool(embeds.isfinite().all()):
        return Embedded(prompt, embeds.cpu())
    return Embedded(prompt, problem="its embeddings are not finite", is_finite=False)


def _sources(row: Row) -> list[Any]:
    return [source.read() if isinstance(source, Held) else source for source in row.sources]


def _refuse(problem: str) -> None:
    raise ValueError(problem)


def _read(sources: Sequence[Any], task: Task, resize: bool) -> list[np.ndarray]:
    """Read images and resize them as the task's pipeline does, uint8 [h, w, 3] each."""
    images = [load_image(source) for source in sources]
    template = template_of(task)
    return [np.asarray(template.resized(image) if resize else image) for image in images]


def facts_of(prompt: Prompt, settings: Settings, version: str) -> Mapping[str, str]:
    """What a file says of the embeddings in it."""
    return {
        "prompt": prompt.row.text,
        "task": settings.task,
        "template": template_of(settings.task).system,
        "model": settings.model,
        "resize": str(settings.resize),
        "compat": settings.compat,
        "max_sequence_length": str(settings.max_sequence_length),
        "version": version,
    }
