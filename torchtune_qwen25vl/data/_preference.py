"""Rows of preference: two answers to a prompt, or one that was liked or not.

The sample of a pair is that of its chosen answer, with that of the rejected one under "rejected";
the sample of an answer alone has "liked". Only the last answer of a conversation is trained on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torchtune_qwen25vl.data._conversation import Conversation, Turn
from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data._reader import Reader
from torchtune_qwen25vl.data._weights import weights_of_answers
from torchtune_qwen25vl.media import Rows
from torchtune_qwen25vl.transform import Qwen25VLTransform

NEVER_CUT = ("error", "skip")  # what over_long may be


@dataclass(frozen=True)
class Preference:
    """A row, before its media are read.

    Attributes:
        answers: conversations, each to its answer: the chosen and the rejected one, or one alone
        liked: whether an answer alone was liked
    """

    answers: tuple[Conversation, ...]
    liked: bool | None = None


class PreferenceReader(Reader):
    """The reader of rows of preference; its parser returns a `Preference`."""

    def prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse to hand on a prompt without its answers.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "a row of preference is trained on with its answers, by the recipe preference; where "
            "answers are drawn, take a data set of conversations"
        )

    def _turns(self, row: dict[str, Any]) -> list[Turn]:
        return [answer.turns[-1] for answer in self._preference(row).answers]

    def _preference(self, row: dict[str, Any]) -> Preference:
        parsed: Any = self.parse(row)
        return replace(parsed, answers=tuple(map(_last_trained, parsed.answers)))

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        preference = self._preference(row)
        if any(weights_of_answers(answer.turns, row) for answer in preference.answers):
            raise ValueError(
                "rows and answers of preference have no weights other than 1; leave weight and "
                "loss_scale out"
            )
        if len(preference.answers) == 2 and preference.answers[0] == preference.answers[1]:
            raise ValueError("chosen and rejected are the same, so the row teaches nothing")
        once: dict[int, Any] = {}  # an image that both answers have is decoded once
        answers = []
        for answer in preference.answers:
            for source in answer.images:
                if id(source) not in once:
                    once[id(source)] = self.image(source)
            images = [once[id(source)] for source in answer.images]
            answers.append(self._sample(replace(answer, images=images)))
        return {"answers": answers, "liked": preference.liked}


class PreferenceDataset(SampleDataset):
    """Samples of rows of preference, none of them without its answers."""

    def _sample(self, read: dict[str, Any]) -> dict[str, Any]:
        first, *others = map(self._label, read["answers"])
        liked = {} if read["liked"] is None else {"liked": read["liked"]}
        return {**first, **liked, **({"rejected": others[0]} if others else {})}


def preference_rows(
    model_transform: Qwen25VLTransform,
    rows: Rows,
    parse: Callable[[dict[str, Any]], Preference],
    *,
    source: str,
    **options: Any,
) -> SampleDataset:
    """Make a dataset of rows of preference, see `sample_dataset`.

    Raises:
        ValueError: if an option cannot be, or the transform would cut an answer or shrink the
            images of one answer and not of the other.
    """
    if model_transform.over_long not in NEVER_CUT:
        raise ValueError(
            f"both answers of a pair are to see the same images, and none is to be cut, so "
            f"over_long is one of {', '.join(NEVER_CUT)}, got {model_transform.over_long!r}; raise "
            "max_seq_len or lower max_pixels"
        )
    parser: Any = parse
    kinds = (PreferenceReader, PreferenceDataset)
    return sample_dataset(model_transform, rows, parser, source=source, kinds=kinds, **options)


def _last_trained(answer: Conversation) -> Conversation:
    """Train on the last turn alone, which is the answer.

    Raises:
        ValueError: if it is not an assistant's.
    """
    *before, last = answer.turns
    if last.role != "assistant":
        raise ValueError(f"an answer ends with a turn of the assistant, got {last.role!r}")
    return replace(answer, turns=[*(replace(turn, trained=False) for turn in before), last])
