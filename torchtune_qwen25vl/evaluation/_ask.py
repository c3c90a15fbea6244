"""Questions to answers and to the log-probabilities of letters."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from torchtune_qwen25vl.evaluation._choices import LETTERS
from torchtune_qwen25vl.evaluation._records import Reply
from torchtune_qwen25vl.evaluation._settings import Settings
from torchtune_qwen25vl.evaluation._truths import Truth
from torchtune_qwen25vl.generation import NotFiniteError, next_log_probs, prompt_batch
from torchtune_qwen25vl.jobs import Answer, Answerer, InHalves, RowQuestion
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import Qwen25VLTransform


class Asker:
    """Ask a model what the metrics of a run need: answers, letters, or both.

    Answers are greedy, and rows do not see what is in flight with them. An image keeps its size: a
    row for which memory is short alone fails.

    Args:
        model: on its device; it is left as it was found
        transform: decodes answers
        settings: what is scored
        truths: what the table says of each row, by name
        batch_tokens: most tokens in flight, padding and answers included
    """

    def __init__(
        self,
        model: Qwen25VL,
        transform: Qwen25VLTransform,
        settings: Settings,
        truths: Mapping[str, Truth],
        *,
        batch_tokens: int,
    ) -> None:
        self._model, self._transform, self._settings = model, transform, settings
        self._truths = truths
        self._answerer = Answerer(
            model,
            transform,
            settings,
            seed=settings.seed,
            batch_size=settings.batch_size,
            batch_tokens=batch_tokens,
        )
        self._in_halves = InHalves[RowQuestion, Reply](
            self._weigh_together,
            refused=_refused,
            too_large=lambda question: Reply(
                question, reason="out of memory with this row alone: lower max_pixels"
            ),
        )

    def __call__(self, batches: Iterable[Sequence[RowQuestion]]) -> Iterator[list[Reply]]:
        """Ask the questions of all batches; yield the replies that ended together, as they end.

        Raises:
            RuntimeError: of the device, other than that memory ran out.
        """
        if not self._settings.generates:
            yield from map(self._weigh, batches)
            return
        weighed: dict[str, Reply] = {}

        def noted() -> Iterator[Sequence[RowQuestion]]:
            for batch in batches:
                if self._settings.weighs:
                    weighed.update({reply.question.name: reply for reply in self._weigh(batch)})
                yield batch

        for answers in self._answerer(noted()):
            yield [_reply(answer, weighed.pop(answer.question.name, None)) for answer in answers]

    def _weigh(self, questions: Sequence[RowQuestion]) -> list[Reply]:
        """Compute how likely each letter is to come first."""
        return self._in_halves(questions, self._model.device)

    def _weigh_together(self, questions: Sequence[RowQuestion]) -> list[Reply]:
        samples = [question.sample for question in questions]
        batch = prompt_batch(samples, self._transform.pad_id, device=self._model.device)
        log_probs = next_log_probs(self._model, batch)  # [b, v]
        replies = []
        for row, question in zip(log_probs, questions, strict=True):
            count = len(self._truths[question.name].choices)
            letters = torch.tensor(self._letters[:count], device=row.device)
            replies.append(Reply(question, log_probs=row[letters].tolist()))
        return replies

    @property
    def _letters(self) -> list[int]:
        """The tokens of the letters.

        Raises:
            ValueError: if a letter is not one token.
        """
        tokens = [self._transform.encode(letter) for letter in LETTERS]
        if any(len(one) != 1 for one in tokens):
            raise ValueError("choice needs letters of one token each, as Qwen's tokenizer has them")
        return [token for (token,) in tokens]


def _reply(answer: Answer, weighed: Reply | None) -> Reply:
    question = answer.question
    assert isinstance(question, RowQuestion)
    reply = Reply(question, reason=answer.reason, is_finite=answer.is_finite)
    if answer.state == "failed":
        return reply
    reply = replace(reply, answer=answer.text, finish=answer.state, tokens=answer.tokens)
    if weighed is None:
        return reply
    return replace(reply, log_probs=weighed.log_probs, reason=weighed.reason)


def _refused(question: RowQuestion, error: ValueError) -> Reply:
    return Reply(question, reason=str(error), is_finite=not isinstance(error, NotFiniteError))
