"""How fast a run is, and how much of the hardware it uses.

Only the floating-point operations that a step needs are counted: frozen weights have no gradient,
unlabelled tokens skip the last MLP and the output, attention sees its window, its frame or its own
sample's past, and what activation checkpointing computes twice counts once.

Shapes: p patches, m merged units, s tokens of a sample.
"""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torchtune import training, utils

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl._position_ids import frame_lengths, window_order
from torchtune_qwen25vl.model import Qwen25VL, part_of
from torchtune_qwen25vl.training._batches import StepBatches
from torchtune_qwen25vl.training._parts import PARTS, parameters_of
from torchtune_qwen25vl.training._peaks import PEAK_TFLOPS
from torchtune_qwen25vl.training._step import output_weight

LABELLED = "labelled"  # what only labelled tokens go through: the last MLP and the output


def peak_tflops(device: torch.device) -> float | None:
    """Return the peak of a device in bf16, TFLOP/s, None if it is not known."""
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


class FlopCounter:
    """Counts the operations that forward and backward of a batch need."""

    def __init__(self, model: Qwen25VL) -> None:
        self.model = model
        learns = {name: any(p.requires_grad for p in parameters_of(model, name)) for name in PARTS}
        # gradients flow back through a part to whatever is trained in it or before it
        self.flows = {
            "vision": learns["vision"],
            "merger": learns["vision"] or learns["merger"],
            "decoder": any(learns.values()),
            LABELLED: any(learns.values()),
        }
        self.weights = dict.fromkeys(self.flows, 0)  # in matrices that rows are multiplied with
        self.trained = dict.fromkeys(self.flows, 0)  # of these, trained
        last: Any = model.layers[-1]
        labelled = {output_weight(model), *last.mlp.parameters()}
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("tok_embeddings" not in name or weight in labelled):
                part = LABELLED if weight in labelled else part_of(name)
                self.weights[part] += weight.numel()
                self.trained[part] += weight.numel() * weight.requires_grad

    def count(self, lengths: Sequence[int], grids: list[list[int]], labels: int) -> float:
        """Count the operations of one batch.

        Args:
            lengths: number of tokens of each sample
            grids: (t, h, w) of each image and video
            labels: number of rows that are projected to the vocabulary
        """
        patches = sum(t * h * w for t, h, w in grids)
        rows = {
            "vision": patches,
            "merger": patches // self.model.vision.spatial_merge_size**2,
            "decoder": sum(lengths),
            LABELLED: labels,
        }
        attention = {
            "vision": self._vision_attention(grids),
            "decoder": self._decoder_attention(lengths),
        }
        total = 0
        for part, flows in self.flows.items():
            total += 2 * rows[part] * ((1 + flows) * self.weights[part] + self.trained[part])
            total += (1 + 2 * flows) * attention.get(part, 0)
        if self.flows["vision"]:  # but not to the pixels
            total -= 2 * patches * self.model.vision.patch_embed.proj.weight.numel()
        return float(total)

    def _vision_attention(self, grids: list[list[int]]) -> int:
        if not grids:
            return 0
        vision = self.model.vision
        _, windows = window_order(
            grids,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        full = len(vision.full_attn_indices)
        pairs = full * _squares(frame_lengths(grids))
        pairs += (len(vision.layers) - full) * _squares(windows)
        return 4 * pairs * vision.patch_embed.proj.out_features

    def _decoder_attention(self, lengths: Sequence[int]) -> int:
        width = self.model.num_heads * self.model.head_dim
        return 2 * _squares(lengths) * width * len(self.model.layers)  # half: causal


def _squares(lengths: Sequence[int]) -> int:
    return sum(length * length for length in lengths)


class Throughput:
    """Speed, memory and waiting time since the last report.

    Args:
        model: model whose operations are counted
        device: device of the model
        tflops: peak of the device in bf16, TFLOP/s; without one, known or given, there is no MFU
    """

    def __init__(self, model: Qwen25VL, device: torch.device, tflops: float | None) -> None:
        self.flops = FlopCounter(model)
        self.device = device
        self.tflops = tflops if tflops is not None else peak_tflops(device)
        self.merge = model.vision.spatial_merge_size**2
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.start, self.waited = time.perf_counter(), 0.0
        self.tokens = self.visual_tokens = self.images = 0
        self.operations = 0.0

    def waiting(self, batches: Iterator[Any]) -> Any:
        """Return the next of these, and count the time until it comes as waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, data: StepBatches) -> None:
        """Count this rank's share of a step."""
        for lengths, grids, labels in zip(data.lengths, data.grids, data.labels, strict=True):
            self.tokens += sum(lengths)
            self.visual_tokens += sum(t * h * w for t, h, w in grids) // self.merge
            self.images += len(grids)
            self.operations += self.flops.count(lengths, grids, labels)

    def report(self) -> dict[str, float]:
        """Return figures over all ranks since the last report: rates per second, memory in GiB."""
        world_size, _ = utils.get_world_size_and_rank()
        seconds = time.perf_counter() - self.start
        counts = [self.tokens, self.visual_tokens, self.images, self.operations, self.waited]
        tokens, visual, images, operations, waited = _ranks.sums(counts, self.device)
        report = {
            "tokens_per_second": tokens / seconds,
            "visual_tokens_per_second": visual / seconds,
            "images_per_second": images / seconds,
            "data_wait": waited / seconds / world_size,
            "peak_memory_gib": self._peak_memory(),
        }
        if self.tflops is not None:
            report["mfu"] = operations / seconds / world_size / (self.tflops * 1e12)
        self.restart()
        return report

    def _peak_memory(self) -> float:
        """Return the peak of the device since the last report, or of the process on a CPU."""
        if self.device.type != "cpu":
            return training.get_memory_stats(self.device)["peak_memory_alloc"]
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
