"""The plan of a run: how many steps it takes, what they train and what they need; printed first."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl._torchtune import NF4Tensor
from torchtune_qwen25vl.device import look
from torchtune_qwen25vl.training._parts import Part, parameters_of
from torchtune_qwen25vl.training._samples import Key, SeededDataset, Share
from torchtune_qwen25vl.training._walk import Walk

LOOKED_AT = 8  # samples that are read for their lengths
WARMUP = "num_warmup_steps"


def count_steps(
    samples: int, share: Share, *, epochs: float | None = None, max_steps: int | None = None
) -> int:
    """Return the steps of a run: `max_steps`, or those of `epochs` passes with their last part."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None
    return max(1, math.ceil(round(epochs * samples) / share.step_samples))


def warmup_steps(schedule: Mapping[str, Any], ratio: float | None, steps: int) -> dict[str, int]:
    """Return the schedule's option for the steps in which the rates rise; empty if it has none.

    Args:
        schedule: section `lr_scheduler` of the YAML
        ratio: part of all steps, in place of a number in the section
        steps: number of steps of the run

    Raises:
        ValueError: if the rates would rise until the end, so that nothing is trained at its peak.
    """
    if ratio is not None:
        return {WARMUP: int(ratio * steps)}
    if WARMUP not in schedule:
        return {}
    warmup = schedule[WARMUP]
    if warmup >= steps:
        raise ValueError(
            f"the rates rise for fewer steps than the run takes, but lr_scheduler.{WARMUP} is "
            f"{warmup} and the run takes {steps}: set warmup_ratio=0.03 in its place, or train "
            "longer"
        )
    return {WARMUP: warmup}


def describe(
    model: nn.Module,
    parts: Mapping[str, Part],
    dataset: Any,
    walk: Walk,
    share: Share,
    *,
    steps: int,
    warmup: int,
    seed: int,
) -> str:
    """Write the plan of a run, a few lines for people.

    Args:
        model: model on its device, with its weights
        parts: how each part is trained
        dataset: data set of the training; a few of its samples are read
        walk: places of the run
        share: share of this rank
        steps: number of steps of the run
        warmup: number of steps in which the rates rise
        seed: seed of what samples draw
    """
    lines = [
        *_of_data(dataset, walk, share, steps, seed),
        f"{steps} steps, the rates rise in the first {warmup}",
    ]
    lines += [_of_part(model, name, part) for name, part in parts.items()]
    lines.append(_of_memory(model))
    return "\n".join(lines)


def _of_data(dataset: Any, walk: Walk, share: Share, steps: int, seed: int) -> Iterator[str]:
    rows, seen = walk.of_pass, steps * share.step_samples
    passes = f"{seen / rows:.2f} passes"
    left = f", {rows - seen} rows are never seen" if seen < rows else ""
    yield f"{rows} rows, {share.step_samples} in a step: {passes}{left}"
    for part in walk.portions:
        yield f"a pass has {part.seen} rows of the {part.places} of {part.source}"
    if walk.empty:
        yield f"{len(walk.empty)} of these rows turned bad since the run began, and are left out"
    seeded = SeededDataset(dataset, seed, walk.empty)
    samples = [seeded[Key(place, 0)] for place in walk.some_places(LOOKED_AT)]
    tokens = _mean([len(sample["tokens"]) for sample in samples])
    if "labels" not in samples[0]:
        yield f"a prompt has about {tokens:.0f} tokens ({len(samples)} rows were read)"
        return
    labels = _mean([_count_labels(sample["labels"]) for sample in samples])
    yield (
        f"a row has about {tokens:.0f} tokens, {labels:.0f} of them trained on "
        f"({len(samples)} rows were read): {tokens * seen:.3g} tokens in all"
    )


def _of_part(model: nn.Module, name: str, part: Part) -> str:
    numbers = [(p.numel(), p.requires_grad) for p in parameters_of(model, name)]
    trained, all_numbers = sum(n for n, trains in numbers if trains), sum(n for n, _ in numbers)
    rate = "" if part.lr is None else f", peak rate {part.lr:g}"
    return f"{name}: {part.train}, {trained:,} of {all_numbers:,} parameters are trained{rate}"


def _of_memory(model: nn.Module) -> str:
    held = sum(map(_bytes, model.parameters()))
    needed = 3 * sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    machine = look(str(next(model.parameters()).device))
    return (
        f"weights take {held / 1e9:.2f} GB; gradients and moments (two, as of AdamW) take "
        f"{needed / 1e9:.2f} GB beside the weights and the activations; {machine.free / 1e9:.2f} "
        f"GB are free on {machine.name}"
    )


def _bytes(parameter: torch.Tensor) -> int:
    held = _local(parameter)
    if isinstance(held, NF4Tensor):
        names, _ = held.__tensor_flatten__()
        return sum(getattr(held, name).nbytes for name in names)
    return held.nbytes


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _count_labels(labels: Any) -> int:
    return int((torch.as_tensor(labels) != CROSS_ENTROPY_IGNORE_IDX).sum())


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)
