"""The metrics by name: what each needs of a model, and the score of every row."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torchtune_qwen25vl.evaluation._choices import choice, choice_by_answer
from torchtune_qwen25vl.evaluation._cider import cider
from torchtune_qwen25vl.evaluation._places import box_iou
from torchtune_qwen25vl.evaluation._texts import anls, exact_match

METRICS = ("exact_match", "anls", "cider", "box_iou", "choice", "choice_by_answer")
BOXES, WEIGHING = "box_iou", "choice"  # one whose references are boxes, one that asks for letters
CHOOSING = {"choice", "choice_by_answer"}


@dataclass(frozen=True)
class Case:
    """An answer beside what the table says.

    Attributes:
        answer: what the model said
        references: texts of which one was asked for
        boxes: boxes of which one was asked for, in pixels of the image as the model sees it
        choices: words of each choice
        right: index of the right one
        log_probs: log-probability of each choice's letter after the prompt
    """

    answer: str = ""
    references: Sequence[str] = ()
    boxes: Sequence[Sequence[float]] = ()
    choices: Sequence[str] = ()
    right: int = -1
    log_probs: Sequence[float] = ()


@dataclass(frozen=True)
class Score:
    """What a metric comes to.

    Attributes:
        mean: over all rows that are scored; None where there are none
        standard_error: standard error of that mean, deviation / sqrt(n); None for fewer than 2 rows
        n: number of these rows
    """

    mean: float | None
    standard_error: float | None
    n: int


def score_rows(
    metrics: Iterable[str],
    cases: Sequence[Case],
    *,
    anls_threshold: float = 0.5,
    iou_threshold: float = 0.5,
) -> dict[str, list[float]]:
    """Return the score of each case, by metric.

    Args:
        metrics: names of `METRICS`
        cases: all rows that are scored; `cider` depends on all of them
        anls_threshold: threshold of `anls`
        iou_threshold: threshold of `box_iou`
    """
    of_text = partial(anls, threshold=anls_threshold)
    of_box = partial(box_iou, threshold=iou_threshold)
    functions: dict[str, Callable[[], list[float]]] = {
        "exact_match": lambda: [exact_match(case.answer, case.references) for case in cases],
        "anls": lambda: [of_text(case.answer, case.references) for case in cases],
        "cider": lambda: cider([c.answer for c in cases], [c.references for c in cases]),
        "box_iou": lambda: [of_box(case.answer, case.boxes) for case in cases],
        "choice": lambda: [choice(case.log_probs, case.right) for case in cases],
        "choice_by_answer": lambda: [
            choice_by_answer(case.answer, case.choices, case.right) for case in cases
        ],
    }
    return {name: functions[name]() if cases else [] for name in metrics}


def averaged(scores: Sequence[float]) -> Score:
    """Return the mean of scores with its standard error."""
    if not scores:
        return Score(None, None, 0)
    several = len(scores) > 1
    error = statistics.stdev(scores) / math.sqrt(len(scores)) if several else None
    return Score(statistics.fmean(scores), error, len(scores))
