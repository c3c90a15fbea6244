"""Rewards: functions of a prompt, an answer and the row they belong to.

A reward is called as `reward(prompt, answer, row)` and returns a number, or None where it has
nothing to say of the row. `row` has the columns of the data set and "reference", the answer that
stood in the row, if one did. A component of the YAML makes one:

    rewards:
      - {_component_: torchtune_qwen25vl.training.exact_match, weight: 1.0}
      - {_component_: my_rewards.politeness, words: [please], weight: 0.2}
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchtune_qwen25vl.data import first_box, normalised, overlap

Reward = Callable[[str, str, Mapping[str, Any]], float | None]


def exact_match(*, column: str = "reference") -> Reward:
    """Make a reward of 1 for the answer that stands in a column, or for one of those there.

    Both are `normalised`, as the metric of this name has them.

    Args:
        column: column of a text or a list of texts
    """

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        wanted = _column(row, column)
        right = [wanted] if isinstance(wanted, str) else list(map(str, wanted))
        return float(normalised(answer) in map(normalised, right))

    return reward


def pattern(*, regex: str, whole: bool = False) -> Reward:
    """Make a reward of 1 for an answer in which a regular expression is found.

    Args:
        regex: regular expression
        whole: whether it is to match the whole answer, which gives a reward of form

    Raises:
        ValueError: if it is none.
    """
    try:
        found = re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"regex is a regular expression, got {regex!r}: {error}") from error
    match = found.fullmatch if whole else found.search

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        return float(match(answer) is not None)

    return reward


def json_form(*, keys: Sequence[str] = ()) -> Reward:
    """Make a reward of 1 for an answer that is JSON, in a code fence or not, and has these keys.

    Args:
        keys: keys of the object, or of each object of the list
    """

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        text = re.sub(r"^```(?:json)?\s*|\s*```$", "", answer.strip())
        try:
            value = json.loads(text)
        except ValueError:
            return 0.0
        objects = value if isinstance(value, list) else [value]
        return float(all(isinstance(one, dict) and set(keys) <= one.keys() for one in objects))

    return reward


def box_iou(*, column: str = "reference", threshold: float | None = None) -> Reward:
    """Make a reward of how far the first box of an answer covers that of a column.

    Both are in pixels of the resized image, in which the model names places; those of the row's own
    answer are moved there as for training.

    Args:
        column: column of a text with a box, or of four numbers
        threshold: intersection over union from which the reward is 1, and else 0; None: the
            intersection over union itself
    """

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        said, right = _box(answer), _box(_column(row, column))
        if right is None:
            raise ValueError(f"{column} holds a box of four numbers, got {row.get(column)!r}")
        found = 0.0 if said is None else overlap(said, right)
        return found if threshold is None else float(found >= threshold)

    return reward


def length(*, most: int, least: int = 1) -> Reward:
    """Make a reward of 1 for an answer of so many words.

    Args:
        most: most words
        least: fewest words
    """

    def reward(prompt: str, answer: str, row: Mapping[str, Any]) -> float:
        return float(least <= len(answer.split()) <= most)

    return reward


def _column(row: Mapping[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise ValueError(
            f"a reward reads the column {column!r}, which the row lacks; it has {sorted(row)}"
        )
    return row[column]


def _box(value: Any) -> list[float] | None:
    if isinstance(value, str):
        return first_box(value)
    numbers = [float(v) for v in value if type(v) in (int, float)]
    return numbers if len(numbers) == len(value) == 4 else None
