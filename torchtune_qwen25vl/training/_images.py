"""The distinct images and videos of a step, each encoded once however often it is shown.

Shapes: m placeholders, i images and videos, p patches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchtune_qwen25vl.transform import PATCHES_PER_PLACEHOLDER


class Images:
    """Numbers the embeddings of all distinct images of some samples, in the order of these."""

    def __init__(self) -> None:
        self.pixels: list[Tensor] = []  # of each image, [p, patch_dim]
        self.grids: list[list[int]] = []  # of each, (t, h, w)
        self.firsts = [0]  # number of the first embedding of each, and of the next one to come

    def numbers(self, sample: Mapping[str, Any]) -> Tensor:
        """Return the number of the embedding at each placeholder of a sample, [m]."""
        if "encoder_input" not in sample:
            return torch.zeros(0, dtype=torch.long)
        vision = sample["encoder_input"]["vision"]
        grids = vision["grid_thw"]
        pieces = vision["pixel_values"].split(grids.prod(-1).tolist())
        found = [self._find(*pair) for pair in zip(pieces, grids.tolist(), strict=True)]
        return torch.cat([torch.arange(self.firsts[k], self.firsts[k + 1]) for k in found])

    def _find(self, pixels: Tensor, grid: list[int]) -> int:
        middle = len(pixels) // 2  # tells most images apart at once
        for k, known in enumerate(self.pixels):
            may_be = self.grids[k] == grid and torch.equal(known[middle], pixels[middle])
            if may_be and torch.equal(known, pixels):
                return k
        self.pixels.append(pixels)
        self.grids.append(grid)
        self.firsts.append(self.firsts[-1] + len(pixels) // PATCHES_PER_PLACEHOLDER)
        return len(self.pixels) - 1


class Encoded:
    """Which images of a step are encoded already, and where their embeddings stand.

    Args:
        images: images of the step, all of them
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self.offsets = torch.full([len(images.grids)], -1)  # place of the first embedding of each
        self.length = 0  # number of embeddings

    def show(self, numbers: Tensor) -> tuple[Tensor, list[int]]:
        """Return where the embeddings of some placeholders stand, [m], and which images are new."""
        firsts = torch.tensor(self.images.firsts)
        shown = torch.searchsorted(firsts, numbers, right=True) - 1  # image of each placeholder
        new = [k for k in shown.unique().tolist() if self.offsets[k] < 0]
        for k in new:
            self.offsets[k] = self.length
            self.length += int(firsts[k + 1] - firsts[k])
        return numbers - firsts[shown] + self.offsets[shown], new

    def encoder_input(self, images: list[int]) -> dict[str, Any]:
        """Return the model's argument that encodes these images; nothing if there are none."""
        if not images:
            return {}
        pixels = torch.cat([self.images.pixels[k] for k in images])
        grids = torch.tensor([self.images.grids[k] for k in images])
        return {"encoder_input": {"vision": {"pixel_values": pixels, "grid_thw": grids}}}
