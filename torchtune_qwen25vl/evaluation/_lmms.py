"""Our model in lmms-eval: `lmms_eval --model torchtune_qwen25vl --model_args model=FOLDER`.

lmms-eval finds the class by an entry point of this package and imports it by its path, which is
when lmms_eval is imported here. Tested with lmms-eval 0.7.3, which needs an environment of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtune.data import Message

from torchtune_qwen25vl import device as devices
from torchtune_qwen25vl.generation import Sampling, check_options
from torchtune_qwen25vl.jobs import Answer, Answerer, Question
from torchtune_qwen25vl.media import load_image
from torchtune_qwen25vl.weights import fetch, find_adapter

NAME, CLASS = "torchtune_qwen25vl", "TorchtuneQwen25VL"
TOKENS = 128  # of an answer, where a task does not say
SAMPLED = ("temperature", "top_k", "top_p", "repetition_penalty")
NEUTRAL: dict[str, Any] = {"num_beams": 1, "use_cache": True}  # the one value of these
READ = ("max_new_tokens", "do_sample", "until", *SAMPLED)


def lmms_manifest() -> Any:
    """Return what lmms-eval's registry is told of the model, for the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.{CLASS}")


def __getattr__(name: str) -> Any:
    """Make the class when it is asked for: its base is lmms-eval's."""
    if name != CLASS:
        raise AttributeError(name)
    from lmms_eval.api.model import lmms

    return model_class(lmms)


def model_class(base: type) -> type:
    """Make the model class of lmms-eval.

    Args:
        base: `lmms_eval.api.model.lmms`
    """

    class TorchtuneQwen25VL(base):
        """Qwen2.5-VL of this package; images and text, answers by generation."""

        is_simple = False

        def __init__(self, **options: Any) -> None:
            super().__init__()
            self._ours = Ours(**options)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """Answer all requests, each as it would be alone, in their order."""
            asked = []
            for request in requests:
                _, doc_to_messages, options, doc_id, task, split = request.args
                messages = doc_to_messages(self.task_dict[task][split][doc_id])
                asked.append((f"{task} {split} {doc_id}", messages, options))
            return self._ours.answers(asked)

        def loglikelihood(self, requests: Sequence[Any]) -> Any:
            """Refuse: a task asks for this where choices are weighed."""
            raise ValueError(f"{NAME} answers by generation: take a task with generate_until")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
            """Refuse: a task asks for this where questions depend on answers."""
            raise ValueError(f"{NAME} answers one question at a time: take another task")

    return TorchtuneQwen25VL


@dataclass(frozen=True)
class _Manner:
    """How answers are given."""

    max_new_tokens: int
    sampling: Sampling
    until: tuple[str, ...]


class Ours:
    """The model, and how it is asked.

    Args:
        model: folder, folder of an adapter, .safetensors file or hub id
        batch_size: most questions in flight
        device: cuda, cpu, ...; by default what torch finds
        dtype: bf16, fp32 or auto
        min_pixels: images of fewer pixels are enlarged; by default as the checkpoint says
        max_pixels: images of more pixels are shrunk; likewise
        seed: seed of answers that are drawn
    """

    def __init__(
        self,
        model: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        seed: int = 0,
    ) -> None:
        adapter = find_adapter(model)
        source = fetch(model if adapter is None else adapter.base)
        found = devices.check_model(
            source,
            devices.look(device or "auto"),
            devices.Load(1024, min_pixels, max_pixels, own_limits=True),
            adapter=adapter,
            dtype=dtype,
        )
        self._loaded = devices.LoadedModel(source, found.refuse(), None, adapter)
        transform = self._loaded.transform
        limits = {"min_pixels": min_pixels, "max_pixels": found.max_pixels}
        given = {name: value for name, value in limits.items() if value is not None}
        folder = devices.processor_of(self._loaded.settings, adapter)
        self._transform = type(transform).from_folder(folder, **given)
        self._batch_size, self._seed = int(batch_size), seed
        self._batch_tokens = found.batch_tokens

    def answers(self, asked: Sequence[tuple[str, Sequence[Mapping[str, Any]], Any]]) -> list[str]:
        """Answer questions, in their order.

        Args:
            asked: name of each question, its messages as lmms-eval has them, and the task's options

        Raises:
            ValueError: naming the question, if it cannot be asked or answered.
        """
        manners: dict[_Manner, list[int]] = {}
        for number, (name, _, options) in enumerate(asked):
            manners.setdefault(_read_manner(name, options), []).append(number)
        said: dict[int, str] = {}
        for manner, numbers in manners.items():
            questions = (self._question(f"{n}", *asked[n][:2]) for n in numbers)
            for answers in self._answerer(manner)([question] for question in questions):
                for answer in answers:
                    number = int(answer.question.name)
                    said[number] = _cut(_text(answer, asked[number][0]), manner.until)
        return [said[number] for number in range(len(asked))]

    def _answerer(self, manner: _Manner) -> Answerer:
        return Answerer(
            self._loaded.model,
            self._transform,
            manner,
            seed=self._seed,
            batch_size=self._batch_size,
            batch_tokens=self._batch_tokens,
        )

    def _question(self, number: str, name: str, messages: Sequence[Mapping[str, Any]]) -> Question:
        try:
            read = [Message(m["role"], [_part(part) for part in m["content"]]) for m in messages]
            sample = self._transform({"messages": read}, inference=True)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return Question(number, sample, self._transform.max_pixels)


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """Read a part of a message."""
    if part["type"] == "text":
        return {"type": "text", "content": part["text"]}
    if part["type"] == "image":
        return {"type": "image", "content": load_image(part["url"])}
    raise ValueError(f"{NAME} takes text and images in lmms-eval, got {part['type']}")


def _read_manner(name: str, options: Mapping[str, Any]) -> _Manner:
    """Read the options of a task, of which none is left out in silence."""
    given = {key: value for key, value in options.items() if value is not None}
    for key in given.keys() - set(READ):
        if key not in NEUTRAL or given[key] != NEUTRAL[key]:
            raise ValueError(
                f"{name}: {key} = {given[key]!r} is not computed; take it out of the task, which "
                f"may set {', '.join(READ)}"
            )
    values = {key: given[key] for key in SAMPLED if key in given}
    if not given.get("do_sample", bool(values.get("temperature", 0))):
        values = {key: value for key, value in values.items() if key == "repetition_penalty"}
    until = given.get("until", [])
    manner = _Manner(
        int(given.get("max_new_tokens", TOKENS)),
        Sampling(**values),
        (until,) if isinstance(until, str) else tuple(until),
    )
    check_options(manner.max_new_tokens, manner.sampling)
    return manner


def _text(answer: Answer, name: str) -> str:
    if answer.state == "failed":
        raise ValueError(f"{name}: {answer.reason}")
    return answer.text


def _cut(text: str, until: Sequence[str]) -> str:
    """Return what stands before the first of these."""
    for end in filter(None, until):
        text = text.partition(end)[0]
    return text
