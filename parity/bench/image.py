"""Speed and memory of the image transform, from 0.3 to 12 megapixels."""

from collections.abc import Iterator
from typing import Any

import numpy
import torch

from parity import photos, reference
from parity.bench import Row, compare
from parity.bench.memory import peak_memory
from torchtune_qwen25vl import Qwen25VLImageTransform

CAP, PUBLISHED_CAP = 1003520, 12845056  # max_pixels: transformers' default, the checkpoints' own
CASES = {
    "0.3 MP": (640, 480, CAP),
    "1 MP": (1152, 864, CAP),
    "12 MP to 1 MP": (4000, 3000, CAP),
    "12 MP": (4000, 3000, PUBLISHED_CAP),
}


def rows() -> Iterator[Row]:
    """Every size as PIL image and as tensor [c, h, w], on one thread and on all."""
    yield from (
        _row(case, kind, threads)
        for threads in sorted({1, torch.get_num_threads()})
        for case in CASES
        for kind in ("PIL", "tensor")
    )


def _row(case: str, kind: str, threads: int) -> Row:
    width, height, max_pixels = CASES[case]
    image: Any = photos.noise(width, height)
    if kind == "tensor":
        image = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()
    transform = Qwen25VLImageTransform(max_pixels=max_pixels)
    processor = reference.image_processor(max_pixels=max_pixels)

    def ours() -> torch.Tensor:
        return transform({"image": image})["pixel_values"]

    def theirs() -> torch.Tensor:
        return processor(image, return_tensors="pt")["pixel_values"]

    size = 4 * ours().numel()
    milliseconds = compare(ours, theirs, repeats=11 if width == 4000 else 41, threads=threads)
    memory = [peak_memory(work) / size for work in (ours, theirs)]
    note = "peak memory {:.2f} and {:.2f} of the output".format(*memory)
    return Row(f"{case}, {kind}", threads, *milliseconds, note)
