"""Components for the YAMLs of the tests: samples of random tokens and patches, of every kind."""

import random

import tiny
import torch.nn.functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from parity.inputs import make_inputs
from torchtune_qwen25vl import _torchtune

KINDS = {
    "text": [6, 9],
    "image": [5, (1, 6, 10), 7],
    "two images": [3, (1, 4, 4), 2, (1, 6, 4), 8],
    "video": [4, (3, 4, 6, 1.0), 9],
    "short": [2, 4],
}


class Transform:
    """What a recipe asks of Qwen25VLTransform beside samples."""

    pad_id = 1007
    min_pixels, max_pixels = 3136, 50176


class OtherTransform(Transform):
    """Another name in a YAML."""


def from_dataset(labels):
    """Labels [..., s] as a dataset of the installed torchtune hands them on: later ones shift."""
    if _torchtune.RECIPES_SHIFT_LABELS:
        return labels
    return F.pad(labels[..., 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)


def sample(kind, seed):
    """One sample as a dataset makes it."""
    inputs = make_inputs([KINDS[kind]], tiny.IDS, seed=seed)
    made = {
        "tokens": inputs.tokens[0],
        "labels": from_dataset(inputs.labels[0]),
        "mask": inputs.labels[0] == CROSS_ENTROPY_IGNORE_IDX,
        "input_pos": inputs.positions[0],
    }
    if len(inputs.grid_thw):
        vision = {"pixel_values": inputs.pixel_values, "grid_thw": inputs.grid_thw}
        made["encoder_input"] = {"vision": vision}
    return made


class Samples:
    """A data set that takes these kinds in turn.

    Args:
        transform: not used
        kinds: keys of KINDS
        size: number of samples
        augment: draw each sample anew, by Python's own generator, whenever it is read
    """

    def __init__(self, transform=None, kinds=tuple(KINDS), size=24, augment=False):
        self.kinds, self.size, self.augment = list(kinds), size, augment

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        seed = random.randrange(10**6) if self.augment else index
        return sample(self.kinds[index % len(self.kinds)], seed)
