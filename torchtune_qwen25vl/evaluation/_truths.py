"""What the table says of a row: references, boxes, choices and which of them is right."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtune_qwen25vl.evaluation._choices import LETTERS
from torchtune_qwen25vl.evaluation._metrics import BOXES, CHOOSING
from torchtune_qwen25vl.jobs import Row, as_text

REFERENCES = ("references", "reference", "answers", "answer", "gt_answer", "captions", "caption")
CHOICES = ("choices", "options")


@dataclass(frozen=True)
class Truth:
    """What the table says of a row.

    Attributes:
        references: texts of which one is asked for
        boxes: boxes of which one is asked for, in pixels of the image as it is stored
        choices: words of each choice
        right: index of the right one
    """

    references: tuple[str, ...] = ()
    boxes: tuple[tuple[float, ...], ...] = ()
    choices: tuple[str, ...] = ()
    right: int = -1


def read_truth(row: Row, columns: Mapping[str, str | None], metrics: Collection[str]) -> Truth:
    """Read what the table says of a row, as far as metrics need it.

    Args:
        row: row of the table
        columns: names of the columns `reference` and `choices`; None for those in use
        metrics: names of metrics

    Raises:
        ValueError: naming the row, if it has no reference or choices, or they are none such.
    """
    try:
        value = _value(row, columns["reference"], REFERENCES, "reference")
        of_boxes = BOXES in metrics
        boxes = _boxes(value) if of_boxes else ()
        choices: tuple[str, ...] = ()
        if CHOOSING & set(metrics):
            choices = _texts(_value(row, columns["choices"], CHOICES, "choices"))
        references = () if of_boxes else _texts(value)
        right = _right(references[0], choices) if choices else -1
    except ValueError as error:
        raise ValueError(f"row {row.name} (number {row.number}): {error}") from error
    return Truth(references, boxes, choices, right)


def choices_of(row: Row, column: str | None) -> tuple[str, ...]:
    """Return the choices of a row, none where it has none.

    Raises:
        ValueError: if they are no texts, or the row has no column of that name.
    """
    if column is not None and column not in row.columns and not row.problem:
        raise ValueError(f"row {row.name} has no column {column!r}, it has {list(row.columns)}")
    return _texts(_found(row, column, CHOICES) or [])


def _value(row: Row, asked: str | None, usual: Sequence[str], what: str) -> Any:
    if (value := _found(row, asked, usual)) is None:
        raise ValueError(
            f"there is no {what} in {asked or ' or '.join(usual)}, the row has "
            f"{', '.join(row.columns)}; fill it in, take the row out, or name the column, "
            f"columns.{what}=NAME"
        )
    return value


def _found(row: Row, asked: str | None, usual: Sequence[str]) -> Any:
    """Return what the first of these columns holds that has anything; None where none has."""
    values = (row.columns.get(name) for name in (usual if asked is None else [asked]))
    return next((_unpacked(value) for value in values if value not in (None, "", [])), None)


def _unpacked(value: Any) -> Any:
    """Return what JSON text of a list holds, and all else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if wrong := [one for one in values if not isinstance(one, str | int | float)]:
        raise ValueError(
            f"a reference or choice is a text, and several are a list of texts, got {wrong[0]!r}"
        )
    return tuple(map(as_text, values))


def _boxes(value: Any) -> tuple[tuple[float, ...], ...]:
    several = value if isinstance(value, list) and isinstance(value[0], list) else [value]
    for box in several:
        is_box = isinstance(box, list) and len(box) == 4
        if not (is_box and all(isinstance(number, int | float) for number in box)):
            raise ValueError(
                f"a reference is a box [x1, y1, x2, y2] in pixels of the image file, or a list of "
                f"boxes, got {box!r}"
            )
    return tuple(map(tuple, several))


def _right(reference: str, choices: Sequence[str]) -> int:
    """Return the choice that a reference means: by its words, its letter, or its number from 0."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(
            f"choices are 2 to {len(LETTERS)}, one for each letter, got {len(choices)}"
        )
    if reference in choices:
        return choices.index(reference)
    letters = LETTERS[: len(choices)]
    if len(reference) == 1 and reference in letters:
        return letters.index(reference)
    if reference.isdecimal() and int(reference) < len(choices):
        return int(reference)
    raise ValueError(
        f"the reference is the words of a choice, its letter ({letters[0]} to {letters[-1]}) or "
        f"its number from 0, got {reference!r} for {list(choices)}"
    )
