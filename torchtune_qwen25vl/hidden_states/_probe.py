"""What hidden states hold of a label: a linear probe for each selector, on images it has not seen.

Shapes: n rows that have the label and states, c classes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from torchtune_qwen25vl._plots import write_figure
from torchtune_qwen25vl.hidden_states._extra import needed
from torchtune_qwen25vl.hidden_states._selectors import NUMBERED
from torchtune_qwen25vl.hidden_states._states import States
from torchtune_qwen25vl.jobs import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WRONG = "answer_is_wrong"
"""A label that needs no column: whether the model's answer is another than the table's."""
FOLDS, SHUFFLES = 5, 3
STRENGTH = 0.1  # C of the logistic regression, on features of variance 1
TICKS = 15  # of the picture, at most
CHANCE_ERRORS = 4  # standard errors within which the control is at chance


@dataclass(frozen=True)
class Probe:
    """What one selector holds of a label.

    Attributes:
        selector: SITE/SPAN
        auroc: mean over folds of the area under the ROC curve; of several classes, over each
            against all others
        spread: standard deviation over folds
        control: the same of labels that were shuffled, mean over shuffles and folds
        control_error: standard error that the control has by chance
        rows: number of rows
    """

    selector: str
    auroc: float
    spread: float
    control: float
    control_error: float
    rows: int

    @property
    def control_is_at_chance(self) -> bool:
        """Whether nothing but the label makes the difference."""
        return abs(self.control - 0.5) <= CHANCE_ERRORS * self.control_error


def probe(states: States, label: str, *, seed: int = 0) -> list[Probe]:
    """Probe every selector of a run for a label, by logistic regression.

    Rows are split into folds of near-equal shares of each class, and all rows of an image lie in
    one fold, so that no probe is tested on an image it was fitted to.

    Args:
        states: of a run
        label: a column of its table, or `WRONG`
        seed: of the folds and of the shuffled labels

    Raises:
        ValueError: if scikit-learn is not installed, or the label cannot be probed.
    """
    with needed("probes"):
        from threadpoolctl import threadpool_limits
    labels = read_labels(states, label)
    _refuse_lone_class(labels, label)
    groups = np.array(
        [image or f"row {number}" for number, image in enumerate(states.images)], dtype=object
    )
    found = []
    for selector in tqdm(states.selectors, "probing", unit="selector", leave=False):
        features = states[selector]
        if not isinstance(features, np.ndarray):
            continue  # whole spans have another length in each row
        has_both = [k for k, text in enumerate(labels) if text and states.states[k] == "done"]
        x = np.asarray(features[has_both], dtype=np.float32)  # [n, width]
        is_there = np.isfinite(x).all(-1)  # a row without images has none of theirs
        kept = np.array(has_both)[is_there]
        y = np.array([labels[k] for k in kept])
        with threadpool_limits(1):  # a fit is many small products: two threads take longer
            found.append(_probe(selector, x[is_there], y, groups[kept], seed))
    return found


def read_labels(states: States, label: str) -> list[str]:
    """Return the label of every row, as text; empty where a row has none.

    Raises:
        ValueError: if there is no such column.
    """
    if any(label in row for row in states.rows):
        return [as_text(row.get(label)).strip() for row in states.rows]
    if label == WRONG:
        pairs = zip(states.truths, states.answers, strict=True)
        return [
            str(_plain(truth) != _plain(said)).lower() if truth else "" for truth, said in pairs
        ]
    columns = sorted({name for row in states.rows for name in row})
    raise ValueError(f"label is a column of {columns}, or {WRONG}; got {label!r}")


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _refuse_lone_class(labels: Sequence[str], label: str) -> None:
    counts = Counter(filter(None, labels))
    rare = [text for text, count in counts.items() if count < 2]
    if len(counts) < 2 or rare:
        what = f"each twice or more, {rare} are there once" if rare else f"got {dict(counts)}"
        raise ValueError(f"label {label!r} needs two classes or more, {what}")


def _probe(selector: str, x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int) -> Probe:
    if len(set(y)) < 2:
        return Probe(selector, np.nan, np.nan, np.nan, np.nan, len(y))
    scores = list(_scores(x, y, groups, seed))
    chance = np.random.default_rng(seed)
    controls = [s for _ in range(SHUFFLES) for s in _scores(x, chance.permutation(y), groups, seed)]
    counts = list(Counter(y).values())
    errors = [sqrt((len(y) + 1) / (12 * count * (len(y) - count))) for count in counts]
    return Probe(
        selector,
        float(np.mean(scores)),
        float(np.std(scores)),
        float(np.mean(controls)),
        max(errors) / sqrt(SHUFFLES),
        len(y),
    )


def _scores(x: np.ndarray, y: np.ndarray, groups: np.ndarray, seed: int) -> Iterator[float]:
    """Yield the area under the curve of each fold in which all classes are tested."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    folds = max(2, min(FOLDS, min(Counter(y).values()), len(set(groups))))
    split = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in split.split(x, y, groups):
        classes = sorted(set(y[train]))
        if set(y[test]) != set(y) or len(classes) < len(set(y)):
            continue
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000))
        guessed = fitted.fit(x[train], y[train]).predict_proba(x[test])  # [n, c]
        yield float(
            np.mean([roc_auc_score(y[test] == one, guessed[:, k]) for k, one in enumerate(classes)])
        )


def as_table(probes: Sequence[Probe]) -> str:
    """Format probes as a table."""
    width = max(len(one.selector) for one in probes)
    lines = [f"{'selector':{width}}  {'AUROC':>14}  {'shuffled':>8}  rows"]
    for one in probes:
        mark = "" if one.control_is_at_chance else "  the control is not at chance"
        score = f"{one.auroc:.3f} +- {one.spread:.3f}"
        lines.append(
            f"{one.selector:{width}}  {score:>14}  {one.control:>8.3f}  {one.rows:>4}{mark}"
        )
    return "\n".join(lines)


def as_report(probes: Sequence[Probe], label: str) -> dict[str, Any]:
    """Return probes as JSON holds them."""
    return {"label": label, "folds": FOLDS, "C": STRENGTH, "probes": [asdict(p) for p in probes]}


def write_picture(path: Path, probes: Sequence[Probe], label: str) -> None:
    """Draw the area under the curve by block, a line for each site and span."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for name, points in _lines(probes).items():
            places, scores, spreads = zip(*sorted(points), strict=True)
            axes.errorbar(places, scores, spreads, marker="o", capsize=3, label=name)
        for one in probes:
            if one.selector.split("/")[0].partition(".")[0] == one.selector.split("/")[0]:
                axes.axhline(one.auroc, linestyle="--", alpha=0.6, label=one.selector)
        axes.axhline(0.5, color="grey", linewidth=1, label="chance")
        blocks = sorted({block for points in _lines(probes).values() for block, *_ in points})
        axes.set_xticks(blocks[:: 1 + len(blocks) // TICKS])
        axes.set(
            xlabel="block", ylabel="AUROC", ylim=(0.3, 1.02), title=f"{label}, by linear probe"
        )
        axes.legend(loc="lower right", fontsize="small")

    write_figure(path, draw, size=(8, 5), dpi=110)


def _lines(probes: Sequence[Probe]) -> dict[str, list[tuple[int, float, float]]]:
    """Return the points of each line: block, area, spread."""
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for one in probes:
        place, span = one.selector.split("/")
        site, dot, number = place.partition(".")
        if dot and site in NUMBERED and number.isdigit():
            lines.setdefault(f"{site}/{span}", []).append((int(number), one.auroc, one.spread))
    return lines
