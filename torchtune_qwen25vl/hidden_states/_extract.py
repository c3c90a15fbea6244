"""Questions to states and answers, in batches; when memory runs out, in smaller ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchtune_qwen25vl.generation import NotFiniteError, generate, prompt_batch
from torchtune_qwen25vl.hidden_states._record import Recorder, hidden_states
from torchtune_qwen25vl.hidden_states._selectors import VISION_SITES
from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.jobs import InHalves, RowQuestion, seeded
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import Qwen25VLTransform


@dataclass(frozen=True)
class Extract:
    """What the model gave for one question, or the reason why it gave nothing.

    Attributes:
        question: what was asked
        states: by selector, [width] or [n, width]
        answer: text of the answer
        finish: "stop", or "length" where it was cut
        problem: why there is nothing
        is_finite: whether the model computed numbers
    """

    question: RowQuestion
    states: Mapping[str, Tensor] = field(default_factory=dict)
    answer: str = ""
    finish: str = ""
    problem: str = ""
    is_finite: bool = True


class Extractor:
    """Ask a model about batches of questions, and take states from the forward that reads them.

    Rows of a batch do not see each other. When memory runs out a batch is halved; a question that
    does not fit alone fails.

    Args:
        model: in evaluation mode, on its device
        transform: decodes answers
        settings: what is wanted
    """

    def __init__(self, model: Qwen25VL, transform: Qwen25VLTransform, settings: Settings) -> None:
        self._model, self._transform, self._settings = model, transform, settings
        self._in_halves = InHalves[RowQuestion, Extract](
            self._extract,
            refused=_refused,
            too_large=lambda question: Extract(
                question, problem="out of memory with this row alone: lower max_pixels"
            ),
        )

    def __call__(self, questions: Sequence[RowQuestion]) -> list[Extract]:
        """Return what the model gives for all questions, in their order.

        Raises:
            RuntimeError: of the device, other than that memory ran out.
        """
        return self._in_halves(questions, self._device)

    @property
    def _device(self) -> torch.device:
        return self._model.device

    def _extract(self, questions: Sequence[RowQuestion]) -> list[Extract]:
        settings, boundary = self._settings, self._settings.vision_boundary
        samples = [question.sample for question in questions]
        batch = prompt_batch(samples, self._transform.pad_id, device=self._device)
        if settings.max_new_tokens == 0:
            taken = hidden_states(self._model, batch, settings.selectors, vision_boundary=boundary)
            answers = [("", "")] * len(questions)
        else:  # the states are those of the prefill that the answer goes on from
            recorder = Recorder(self._model, batch, settings.selectors, vision_boundary=boundary)
            generation = generate(
                self._model,
                batch,
                max_new_tokens=settings.max_new_tokens,
                **settings.sampling._asdict(),
                stop_tokens=self._transform.stop_tokens,
                generator=seeded(settings.seed, questions[0].row.name, self._device),
                observe=recorder,
            )
            taken = recorder.states()
            rows = zip(generation.tokens.tolist(), generation.lengths, strict=True)
            texts = [self._transform.decode(row[:length]).strip() for row, length in rows]
            answers = list(zip(texts, generation.finish_reasons, strict=True))
        return [
            _checked(
                Extract(question, {n: states[row].cpu() for n, states in taken.items()}, *said)
            )
            for row, (question, said) in enumerate(zip(questions, answers, strict=True))
        ]


def _refused(question: RowQuestion, error: ValueError) -> Extract:
    return Extract(question, problem=str(error), is_finite=not isinstance(error, NotFiniteError))


def _checked(extract: Extract) -> Extract:
    """Refuse states that are not finite; those of images are nan where a row has none."""
    row = extract.question.row
    for name, states in extract.states.items():
        if (row.sources or not _is_of_images(name)) and not bool(states.isfinite().all()):
            problem = f"its state {name} is not finite"
            return Extract(extract.question, problem=problem, is_finite=False)
    return extract


def _is_of_images(selector: str) -> bool:
    place, _, span = selector.rpartition("/")
    return span.startswith("image") or place.partition(".")[0] in VISION_SITES
