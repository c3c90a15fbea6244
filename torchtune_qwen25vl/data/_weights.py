"""Weights of messages and rows: the share of a label in the loss, sum(w * ce) / sum(w).

A message has its weight, which is that of its labels, and a row has one that all of them are
multiplied by. 0 is no label at all, and a row without weights has none of this.

Shapes: s tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl.data._conversation import Turn

OF_TURNS = "weights of answers"  # key of what a reader hands on


def read_weight(key: str, value: Any) -> float:
    """Return a weight of a row or a message; text is that of a table.

    Raises:
        ValueError: if it is no number from 0.
    """
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if not isinstance(number, int | float) or not 0 <= number < math.inf:
        raise ValueError(f"{key!r} is a number from 0, got {value!r}")
    return float(number)


def weights_of_answers(turns: Sequence[Turn], row: Mapping[str, Any]) -> list[float]:
    """Return the weight of each answer that is trained on, in order; empty if all weigh 1.

    Args:
        turns: turns of the conversation
        row: row, whose "weight" all are multiplied by

    Raises:
        ValueError: if the row's weight is none, or an answer and the call in it weigh differently.
    """
    own = row.get("weight")
    factor = 1.0 if own in (None, "") else read_weight("weight", own)
    answers: list[list[float]] = []
    before = None
    for turn in turns:
        joins = turn.is_call and before == "assistant"
        if turn.role == "assistant" and not joins:
            answers.append([])
        if turn.role == "assistant" and turn.trained:
            answers[-1].append(factor * turn.weight)
        before = turn.role
    trained = [weights for weights in answers if weights]
    if mixed := [weights for weights in trained if len(set(weights)) > 1]:
        raise ValueError(
            f"a call of a tool shares the turn of the answer before it, and so its weight, got "
            f"{mixed[0]}; give both the same"
        )
    found = [weights[0] for weights in trained]
    return [] if all(weight == 1 for weight in found) else found


def with_weights(sample: dict[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """Add "label_weights", fp32 [s], to a sample, and take out the labels that weigh nothing.

    Args:
        sample: sample with labels, of which each answer has a run of its own
        weights: weight of each answer, of which the last may have been cut off
    """
    labels = np.asarray(sample["labels"])
    labelled = labels != CROSS_ENTROPY_IGNORE_IDX
    begins = labelled & ~np.concatenate([[False], labelled[:-1]])
    answer = np.cumsum(begins) - 1  # from the first label on
    assert begins.sum() <= len(weights), "an answer's labels are one run"
    spread = np.where(labelled, np.asarray(weights)[answer], 0).astype(np.float32)
    kept = list(np.where(spread > 0, labels, CROSS_ENTROPY_IGNORE_IDX))
    return {**sample, "labels": kept, "label_weights": torch.from_numpy(spread)}


def token_weights(sample: Mapping[str, Any], trained: Tensor) -> list[float]:
    """Return the weight of each token of a sample: 0 where it is not trained on.

    Args:
        sample: sample of a dataset
        trained: which tokens are trained on, bool [s]
    """
    if "label_weights" not in sample:
        return trained.float().tolist()
    weights = trained.float()
    weights[trained] = sample["label_weights"][sample["label_weights"] > 0]
    return weights.tolist()
