"""What the model is asked and how it answers: presets, variables, words around a caption."""

import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torchtune_qwen25vl.captioning._texts import Existing
from torchtune_qwen25vl.generation import Sampling
from torchtune_qwen25vl.jobs import Item

VARIABLES = ("name", "directory", "tags", "caption")


@dataclass(frozen=True)
class Preset:
    """A question, and how long its answer may be and how it is sampled."""

    prompt: str
    max_new_tokens: int
    temperature: float = 0.0  # greedy
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    @property
    def sampling(self) -> Sampling:
        """How each token is chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)


PRESETS = {
    "standard": Preset(
        "Describe this image in one or two plain sentences. Say only what can be seen.",
        max_new_tokens=128,
    ),
    "detailed": Preset(
        "Describe this image completely: every object and person with colour, size, material and "
        "place, what they do, the background, the light, the style, and any text, word for word. "
        "Write plain sentences, no list, and no guesses about what cannot be seen.",
        max_new_tokens=512,
    ),
    "creative": Preset(
        "Describe this image as a gifted writer would: its mood, its atmosphere, the story it "
        "hints at, in vivid language, true to what can be seen.",
        max_new_tokens=256,
        temperature=0.7,
        top_p=0.9,
    ),
}


def read_preset(name: str, **changes: Any) -> Preset:
    """Return a preset with what is not None in `changes` in place of its own.

    Raises:
        ValueError: if there is no such preset, or its prompt has an unknown variable.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is one of {', '.join(PRESETS)}, got {name!r}")
    given = {key: value for key, value in changes.items() if value is not None}
    preset = Preset(**asdict(PRESETS[name]) | given)
    check_variables(preset.prompt)
    return preset


def check_variables(prompt: str) -> None:
    """Refuse a prompt whose braces hold anything but a variable.

    Raises:
        ValueError: naming what they hold.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(prompt) if field is not None]
    except ValueError as error:
        raise ValueError(f"the prompt cannot be read ({error}); a brace is written {{{{") from error
    if unknown := sorted(set(fields) - set(VARIABLES)):
        raise ValueError(
            f"a prompt may hold {', '.join(f'{{{name}}}' for name in VARIABLES)}, this one holds "
            f"{', '.join(f'{{{name}}}' for name in unknown)}; a brace of its own is written {{{{"
        )


@dataclass(frozen=True)
class Wording:
    """Everything that is said to the model beside the image, and around its answer.

    Attributes:
        prompt: the question, with {variables}
        system: system prompt; None for the model's own
        language: language that the answer is asked for in
        trigger: word that every caption begins with, before a comma
        prefix: text before that, taken as it is
        suffix: text behind the caption, taken as it is
        newlines: "space" to make one line of an answer, "keep" to leave it
        separator: text between an answer and the caption that it is joined to
    """

    prompt: str
    system: str | None = None
    language: str | None = None
    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    newlines: Literal["keep", "space"] = "keep"
    separator: str = " "

    def question(self, variables: Mapping[str, str]) -> str:
        """Return the prompt for one image."""
        asked = self.prompt.format_map(variables)
        return f"{asked} Answer in {self.language}." if self.language else asked

    def around(self, answer: str) -> str:
        """Make the caption of the model's answer."""
        if self.newlines == "space":
            answer = " ".join(filter(None, map(str.strip, answer.splitlines())))
        return f"{self.prefix}{self._trigger}{answer}{self.suffix}"

    def joined(self, existing: str, caption: str, policy: Existing) -> str:
        """Join a caption to one that was there before, as the policy says; the trigger leads."""
        if not existing or policy not in ("append", "prepend"):
            return caption
        existing = existing.removeprefix(self._trigger)
        if policy == "prepend":
            return f"{caption}{self.separator}{existing}"
        rest = caption.replace(self._trigger, "", 1)
        return f"{self._trigger}{existing}{self.separator}{rest}"

    @property
    def _trigger(self) -> str:
        return f"{self.trigger}, " if self.trigger else ""


def variables_of(item: Item, existing: str) -> dict[str, str]:
    """Return the variables of a prompt for one image; name and directory are its file's."""
    path = item.path
    values = (
        path.stem if path else item.name.rpartition("#")[2],
        path.parent.name if path else "",
        item.texts.get("tags", ""),
        existing,
    )
    return dict(zip(VARIABLES, map(printable, values), strict=True))


def printable(text: str) -> str:
    """Spell out the bytes of a file's name that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
