"""What a GPU computes in its own way, against the CPU: largest differences, with a control each."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parity import reference
from parity.gpu._figures import Figure, Sizes
from parity.inputs import LAYOUTS, Inputs, make_inputs
from parity.runner import run_stage
from parity.stages import STAGES, Setting
from parity.trace import ours_like
from torchtune_qwen25vl import generate, linear_cross_entropy, packed_collate
from torchtune_qwen25vl.transform import batch_to_device

NAMED = (
    *("encoder", "decoder layers", "logits", "loss", "packed", "greedy tokens", "bf16"),
    *("NF4", "int4"),
)
NEW = 40  # tokens: several times as many as the host looks at together


def stages(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Parity's stages on the device, in fp32 and bf16; a fault must show in each."""
    setting = Setting(device=str(device))
    for stage in STAGES:
        if stage.name in NAMED:
            outcome = run_stage(stage, setting)
            verdict = "passed" if outcome.passed else f"FAILED {outcome.problem}".strip()
            note = f"{verdict}, {len(outcome.measurements)} cases"
            if outcome.worst is not None:
                note += f"; tolerance of the nearest {outcome.worst.tolerance:.1e}"
            yield Figure(f"stage {stage.name}", outcome.error, "error", note=note)


def tokens(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Greedy tokens in fp32: recorded as a graph here, in growing shapes on the CPU."""
    theirs = reference.random_model("tiny")
    inputs = make_inputs(LAYOUTS["mixed batch"], reference.IDS).padded_left()
    expected = generate(ours_like(theirs), inputs.ours, max_new_tokens=NEW).tokens
    moved = reference.model("tiny", str(device))
    found = generate(ours_like(moved), inputs.to(str(device)).ours, max_new_tokens=NEW).tokens.cpu()
    differing = int((found != expected).sum())
    yield Figure(f"tokens of {expected.numel()} that differ from the CPU's", differing, "tokens")


def packed(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Samples of a packed row in bf16: by the device's kernel for segments, and under a mask."""
    model = ours_like(reference.model("tiny", str(device)), dtype=torch.bfloat16)
    inputs = make_inputs([[40, (1, 8, 12), 9], [17], [5, (1, 4, 6), 30]], reference.IDS)
    samples = [sample_of(inputs.row(row)) for row in range(3)]
    batch = packed_collate(samples, 0)
    del batch["labels"]
    lengths = torch.tensor([len(sample["tokens"]) for sample in samples])
    batch_to_device(batch, device)
    with torch.no_grad():
        dense = model(**batch)
        alone = model(**{**batch, "mask": lengths})
        wrong = model(**{**batch, "mask": lengths.flip(0)})
    yield _difference("packed row, each sample alone, bf16", alone, dense, wrong)


def loss(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Loss and its gradients by liger's kernel, against torch's."""
    if device.type != "cuda":
        return
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 64, device=device, requires_grad=True) for n in (40, 1000))
    labels = torch.randint(1000, (40,), device=device)

    def gradients(**options: str) -> Tensor:
        value = linear_cross_entropy(hidden, weight, labels, **options)  # type: ignore[arg-type]
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, (hidden, weight))])

    right = gradients()
    yield _difference("gradients of liger's loss", gradients(kernel="liger"), right, right.roll(1))


def sample_of(inputs: Inputs) -> dict[str, Any]:
    """Make a row as the transform would, its answer labelled."""
    batch = {**inputs.ours, "labels": inputs.labels}
    media = {"encoder_input": batch.pop("encoder_input")} if "encoder_input" in batch else {}
    return {name: values[0] for name, values in batch.items() if name != "mask"} | media


def _difference(work: str, found: Tensor, expected: Tensor, wrong: Tensor) -> Figure:
    scale = float(expected.abs().max())
    error = float((found - expected).abs().max()) / scale
    control = float((wrong - expected).abs().max()) / scale
    return Figure(work, error, "of the largest", note=f"control {control:.1e}")
