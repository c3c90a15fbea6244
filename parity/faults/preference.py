"""Faults of preference: what an answer is, what it sees, and what it is held against."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtune.modules.peft import disable_adapter

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl.training import TreeCollate, answer_log_probs, place_trees
from torchtune_qwen25vl.training._masks import tree_mask
from torchtune_qwen25vl.training._objective import answer_lengths

Sample = dict[str, Any]


@contextlib.contextmanager
def _leave_on(model: Any) -> Iterator[None]:
    yield


def _with_samples(edit: Callable[[Sample], Sample]) -> Callable[[Callable], Callable]:
    """Collate samples, and the rejected ones in them, that were edited."""

    def wrap(right: Callable) -> Callable:
        def wrong(self: TreeCollate, samples: Sequence[Sample]) -> Any:
            return right(self, [edit(sample) for sample in samples])

        return wrong

    return wrap


def _label_prompt(sample: Sample) -> Sample:
    text = ~torch.isin(sample["tokens"], torch.tensor([1001, 1002]))
    labelled = {**sample, "labels": sample["tokens"].masked_fill(~text, -100)}
    if "rejected" in sample:
        labelled["rejected"] = _label_prompt(sample["rejected"])
    return labelled


def _blank_rejected(sample: Sample) -> Sample:
    if "encoder_input" not in sample.get("rejected", {}):
        return sample
    vision = sample["rejected"]["encoder_input"]["vision"]
    blank = {**vision, "pixel_values": torch.zeros_like(vision["pixel_values"])}
    return {**sample, "rejected": {**sample["rejected"], "encoder_input": {"vision": blank}}}


def _one_axis(right: Callable) -> Callable:
    def wrong(data: Any, *args: Any, **options: Any) -> None:
        right(data, *args, **options)
        for batch in data.batches:
            index = torch.arange(batch["tokens"].shape[1])
            batch["input_pos"] = index.view(1, -1, 1).expand_as(batch["input_pos"])

    return wrong


def _all_before(right: Callable) -> Callable:
    def wrong(spans: Tensor, *, flex: bool) -> Tensor:
        b, s, _ = spans.shape
        return torch.ones(b, s, s, dtype=torch.bool).tril()

    return wrong


FAULTS: dict[str, Fault] = {
    "reference with adapters on": replaced(disable_adapter, lambda right: _leave_on, "preference"),
    "chosen and rejected exchanged": replaced(
        answer_log_probs, lambda right: lambda *a, **kw: right(*a, **kw).flip(1), "preference"
    ),
    "prompt tokens counted": replaced(
        TreeCollate, _with_samples(_label_prompt), "preference", method="__call__"
    ),
    "images of the rejected answer missing": replaced(
        TreeCollate, _with_samples(_blank_rejected), "preference", method="__call__"
    ),
    "sums in place of means": replaced(
        answer_lengths, lambda right: lambda batch: right(batch).clamp(max=1), "preference"
    ),
    "answers on one axis": replaced(place_trees, _one_axis, "preference"),
    "answers see each other": replaced(tree_mask, _all_before, "preference"),
}
