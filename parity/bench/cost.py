"""What steps of the true sizes would cost on a GPU, counted without one: see `parity.bench.meter`.

The prompts have 1,332 tokens, of which an image takes 1,280; training steps have 8 rows of 1,500,
an image in each, 150 of them labelled. Nothing here is measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity.bench.meter import H100, H200, Cost, metered
from torchtune_qwen25vl import model as models
from torchtune_qwen25vl.generation._forward import prefill
from torchtune_qwen25vl.generation._places import Places
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.training import summed_loss, train_step
from torchtune_qwen25vl.training._step import output_weight

SIZES = {"3B": models.qwen2_5_vl_3b, "7B": models.qwen2_5_vl_7b}
LORA = {"3B": models.lora_qwen2_5_vl_3b, "7B": models.lora_qwen2_5_vl_7b}
ADAPTERS: dict[str, Any] = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}
GRID = (1, 64, 80)  # patches: 1,280 placeholders
PROMPT, WIDTH = 1332, 1536
ROWS, ROW, LABELS = 8, 1500, 150
COLUMNS = (
    *("case", "launches", "a layer", "copies in", "waits", "GB"),
    *("H100 ms, estimated", "floor ms", "H200 ms, estimated", "floor ms"),
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    cost: Cost
    layers: int
    weights: int  # bytes that have to be read

    @property
    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        cost = self.cost
        times = [
            f"{milliseconds:.1f}"
            for card in (H100, H200)
            for milliseconds in (cost.milliseconds(card), cost.floor(card, self.weights))
        ]
        a_layer = f"{cost.total / self.layers:.1f}"
        counts = str(cost.total), a_layer, str(cost.copies), str(cost.waits)
        return self.case, *counts, f"{cost.gigabytes:.1f}", *times


def rows() -> Iterator[Row]:
    """Every piece of work, of 3B and of 7B."""
    for size in SIZES:
        model = without_memory(SIZES[size]).eval()
        vision = bytes_of(model.vision)
        weights = bytes_of(model.layers) + output_weight(model).nbytes
        layers, vision_layers = len(model.layers), len(model.vision.layers)
        for b in (1, 8):
            yield Row(f"{size}, a token of {b}", decode(model, b), layers, weights)
            yield Row(f"{size}, {b} prompts of text", read(model, b), layers, weights)
        yield Row(f"{size}, an image", encode(model), vision_layers, vision)
        yield Row(f"{size}, a prompt with an image", read(model, 1, image=True), layers, weights)
        for name, build in (("LoRA", partial(LORA[size], **ADAPTERS)), ("full", SIZES[size])):
            trained = without_memory(build).train()
            yield Row(f"{size}, a step, {name}", step(trained), layers, bytes_of(trained))


def without_memory(build: Callable[[], Qwen25VL]) -> Qwen25VL:
    """Build a model of true size that takes no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(before)


def bytes_of(module: nn.Module) -> int:
    """Count bytes of all weights."""
    return sum(weight.nbytes for weight in module.parameters())


def zeros(*shape: int) -> Tensor:
    """Make integers without memory."""
    return torch.zeros(shape, dtype=torch.int64, device="meta")


def media(images: int) -> dict[str, Any]:
    """Make images, and where their placeholders are in rows that begin with them."""
    count = GRID[1] * GRID[2]
    grids = torch.tensor([GRID] * images)
    pixels = torch.empty(images * count, 1176, dtype=torch.bfloat16, device="meta")
    return {
        "encoder_input": {"vision": {"pixel_values": pixels, "grid_thw": grids}},
        "placeholder_rows": zeros(images * count // 4),
    }


@torch.no_grad()
def decode(model: Qwen25VL, b: int) -> Cost:
    """Count a token of b rows, without the choice among logits."""
    places = Places(model)
    places.reserve(b, WIDTH)
    fixed = places.fixed_step()
    with metered() as cost:
        fixed(zeros(b), zeros(b), zeros(b))
    return cost


@torch.no_grad()
def read(model: Qwen25VL, b: int, *, image: bool = False) -> Cost:
    """Count prompts of one length on their way to the caches."""
    places = Places(model)
    places.reserve(b, WIDTH)
    batch = {"tokens": zeros(b, PROMPT), "input_pos": zeros(b, PROMPT, 3)}
    batch |= media(b) if image else {"placeholder_rows": zeros(0)}
    caches = places.begin(slice(b), batch["tokens"])
    with metered() as cost:
        prefill(model, batch, caches, last=zeros(b))
    return cost


@torch.no_grad()
def encode(model: Qwen25VL) -> Cost:
    """Count an image on its way through the encoder."""
    inputs = media(1)["encoder_input"]["vision"]
    with metered() as cost:
        model.vision(**inputs)
    return cost


def step(model: Qwen25VL) -> Cost:
    """Count forward and backward of a training step, and the waits of all of it."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5)
    batch = {
        "tokens": zeros(ROWS, ROW),
        "labels": zeros(ROWS, ROW),
        "label_rows": zeros(ROWS * LABELS),
        "input_pos": zeros(ROWS, ROW, 3),
        **media(ROWS),
    }
    with metered() as cost:
        summed_loss(model, batch).backward()
    optimizer.zero_grad()
    with metered() as whole:
        train_step(model, optimizer, [batch], max_grad_norm=1.0)
    cost.waits = whole.waits
    return cost
