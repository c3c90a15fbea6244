"""Log-probabilities of a reference, computed once before the training and kept in a file.

The file has a line for what they depend on and then one for each step that computed some, so that
a run which is killed goes on behind the last whole line. Where the policy is trained in full this
needs no second model, for the reference is the model that the run begins with.

Shapes: n places of a run, each a row.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.training._samples import Key, Share

Step = list[Key]
LogProbs = dict[int, list[float]]  # of the two answers of each place


def keep_log_probs(
    path: Path,
    compute: Callable[[list[Step]], Iterator[LogProbs]],
    *,
    identity: Mapping[str, Any],
    places: int,
    share: Share,
) -> Tensor:
    """Return the reference's log-probabilities of all answers, [n, 2], and keep them in a file.

    Args:
        path: file that holds those that are computed already, if there are any
        compute: computes those of this rank, for one step's rows after another
        identity: what they depend on
        places: n
        share: share of this rank in each step

    Raises:
        ValueError: if the file is that of another identity.
    """
    found = _ranks.from_first(_read(path, identity) if _ranks.is_first() else {})
    for own in compute(list(_steps(len(found), places, share))):
        step = {place: values for part in _ranks.gathered(own) for place, values in part.items()}
        if _ranks.is_first():
            _append(path, step)
        found |= step
    return torch.tensor([found[place] for place in range(places)])


def shard_again(model: nn.Module) -> None:
    """Shard what a forward without a backward has left whole, before an optimiser looks at it."""
    if isinstance(model, FSDPModule):
        model.reshard()


class WithReference:
    """A data set whose samples have the reference's log-probabilities, [2], under "reference".

    Args:
        dataset: anything with samples by their index
        log_probs: those of every place, [n, 2]
        empty: places for which the data set has no sample, see `SeededDataset`
    """

    def __init__(self, dataset: Any, log_probs: Tensor, empty: Sequence[int] = ()) -> None:
        self.dataset = dataset
        self.log_probs = log_probs
        self.places = np.setdiff1d(np.arange(len(log_probs)), empty)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the sample at an index, with its reference."""
        reference = self.log_probs[int(self.places[index])]
        return {**self.dataset[index], "reference": reference}


def _steps(done: int, places: int, share: Share) -> Iterator[Step]:
    """Yield the rows of this rank for each step; beyond the last row some that are not counted."""
    for start in range(done, places, share.step_samples):
        first = start + share.rank * share.samples
        numbers = range(first, first + share.samples)
        yield [Key(k % places, 0, counted=k < places) for k in numbers]


def _read(path: Path, identity: Mapping[str, Any]) -> LogProbs:
    """Read what is kept, and remove a line that a killed run left unfinished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    now = json.loads(json.dumps(identity))
    if not whole:
        path.write_bytes(json.dumps(now).encode() + b"\n")
        return {}
    then = json.loads(whole[0])
    if changed := {k: (then.get(k), v) for k, v in now.items() if then.get(k) != v}:
        raise ValueError(
            f"log-probabilities of a reference are kept for one model and one data set, but those "
            f"in {path} differ in (then, now) {changed}; restore these, remove the file, or begin "
            "in another output_dir"
        )
    if len(whole) < len(lines):
        os.truncate(path, sum(map(len, whole)))
    steps = (json.loads(line) for line in whole[1:])
    return {int(place): values for step in steps for place, values in step.items()}


def _append(path: Path, step: LogProbs) -> None:
    with path.open("ab") as file:
        file.write(json.dumps(step).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
