"""One training step: time and peak memory, ours and a plain Hugging Face loop on the same work.

The plain loop is what transformers' documentation shows: the model with `labels`, backward, step.
Both train the same parts from the same weights on the same batch. The learning rate is 0, so that
they can share the weights, and the optimiser SGD, since the moments of two such models would need a
larger machine. Memory counts what a step needs beyond the weights.
"""

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from parity import reference
from parity.bench import Row, as_in_training, compare
from parity.bench.memory import peak_memory
from parity.inputs import Inputs, make_inputs
from parity.trace import ours_like
from torchtune_qwen25vl.training import StepCollate, train_step

PICTURE = (1, 46, 68)  # 782 placeholders
ANSWER = 122
LAYOUT: list[list[int | tuple]] = [[80, PICTURE, ANSWER]]  # 204 tokens around the picture
SHORT = 16  # samples to pack, 8 to 128 tokens long
NARROW, WIDE = "tiny, 3B's vocabulary", "3B with few layers"
REPEATS = {"tiny": 15, NARROW: 7, WIDE: 3}


def rows() -> Iterator[Row]:
    """Few and narrow layers, and few of 3B's.

    The vocabulary is 3B's where logits are part of the question.
    """
    for name in (NARROW, WIDE):
        yield from _picture_rows(name)
    yield from (_packed_row(name) for name in ("tiny", WIDE))


def _picture_rows(name: str) -> Iterator[Row]:
    inputs = make_inputs(LAYOUT, reference.IDS)
    for case, frozen in (("vision frozen", True), ("everything trained", False)):
        ours, theirs = _ours(name, [inputs], frozen), _theirs(name, inputs, frozen)
        yield _row(f"{name}, {case}", name, ours, theirs)


def _packed_row(name: str) -> Row:
    rng = random.Random(0)
    lengths = [round(8 * 16 ** rng.random()) for _ in range(SHORT)]
    layout: list[list[int | tuple]] = [[n - n // 4, n // 4] for n in lengths]  # a quarter answers
    inputs = make_inputs(layout, reference.IDS)
    alone = [inputs.row(index) for index in range(SHORT)]
    packed = _ours(name, alone, frozen=True, pack_to=sum(lengths))
    padded = _ours(name, [inputs], frozen=True)
    row = _row(f"{name}, {SHORT} short samples packed", name, packed, _theirs(name, inputs, True))
    milliseconds = compare(
        *map(as_in_training, (packed, padded)), repeats=REPEATS[name], threads=row.threads
    )
    note = f"{milliseconds[1] / milliseconds[0]:.2f}x our own padded"
    return Row(row.case, row.threads, row.ours, row.theirs, f"{row.note}; {note}")


def _row(case: str, name: str, ours: Callable[[], Any], theirs: Callable[[], Any]) -> Row:
    threads, ours = torch.get_num_threads(), as_in_training(ours)
    milliseconds = compare(ours, theirs, repeats=REPEATS[name], threads=threads)
    memory = [peak_memory(work) / 2**20 for work in (ours, theirs)]
    note = f"peak {memory[0]:.0f} and {memory[1]:.0f} MiB, {memory[0] / memory[1]:.2f}x"
    return Row(case, threads, *milliseconds, note)


def _ours(
    name: str, batches: list[Inputs], frozen: bool, pack_to: int | None = None
) -> Callable[[], Any]:
    model = ours_like(reference.random_model(name)).train()
    data = [{**inputs.ours, "labels": inputs.labels} for inputs in batches]
    if pack_to is not None:
        samples = [{k: v[0] for k, v in batch.items()} for batch in data]
        data = StepCollate(0, batch_size=1, pack_to=pack_to, mask="lengths")(samples).batches
    optimizer = _optimizer(model, "vision.", frozen)
    return lambda: train_step(model, optimizer, data)


def _theirs(name: str, inputs: Inputs, frozen: bool) -> Callable[[], Any]:
    model = reference.random_model(name)
    optimizer = _optimizer(model, "model.visual.", frozen)
    kwargs = reference.forward_kwargs(inputs)

    def step() -> float:
        loss = model(**kwargs, labels=inputs.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def _optimizer(model: nn.Module, vision: str, frozen: bool) -> torch.optim.Optimizer:
    for weight, parameter in model.named_parameters():
        in_encoder = weight.startswith(vision) and not weight.startswith(f"{vision}merger.")
        parameter.requires_grad_(not (frozen and in_encoder))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, lr=0.0)


assert math.prod(PICTURE) == 4 * 782
