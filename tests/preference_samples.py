"""Components for the YAMLs of the tests: pairs of random answers to prompts of every kind."""

import tiny
import torch
import training_samples
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from training_samples import from_dataset

from parity.inputs import make_inputs

# of a prompt: parts, then tokens of the chosen and of the rejected answer
KINDS = {
    "text": ([6], 9, 5),
    "image": ([5, (1, 6, 10), 3], 4, 7),
    "two images": ([3, (1, 4, 4), 2, (1, 6, 4), 2], 8, 3),
    "video": ([4, (3, 4, 6, 1.0), 2], 3, 6),
    "short": ([2], 2, 1),
}


def sample(parts, answer, seed, shift=0):
    """A prompt with this many tokens of an answer, as a dataset makes it; `shift` makes another."""
    inputs = make_inputs([[*parts, answer]], tiny.IDS, seed=seed)
    tokens, labels = inputs.tokens[0].clone(), inputs.labels[0].clone()
    for row in (tokens, labels):
        row[-answer:] = (row[-answer:] + shift) % 1000
    made = {
        "tokens": tokens,
        "labels": from_dataset(labels),
        "mask": labels == CROSS_ENTROPY_IGNORE_IDX,
        "input_pos": inputs.positions[0],
    }
    if len(inputs.grid_thw):
        vision = {"pixel_values": inputs.pixel_values, "grid_thw": inputs.grid_thw}
        made["encoder_input"] = {"vision": vision}
    return made


def pair(kind, seed, *, other_images=False):
    """The sample of a pair; with `other_images` its rejected answer is to other images."""
    parts, chosen, rejected = KINDS[kind]
    worse = sample(parts, rejected, seed, shift=17)
    if other_images:
        vision = worse["encoder_input"]["vision"]
        worse["encoder_input"] = {"vision": {**vision, "pixel_values": -vision["pixel_values"]}}
    return {**sample(parts, chosen, seed), "rejected": worse}


def unpaired(kind, seed):
    """The sample of an answer that was liked, or not."""
    parts, chosen, _ = KINDS[kind]
    return {**sample(parts, chosen, seed), "liked": seed % 3 > 0}


def ignored(made):
    """A sample that only fills up a step."""
    return {**made, "labels": torch.full_like(made["labels"], CROSS_ENTROPY_IGNORE_IDX)}


class Pairs:
    """A data set that takes these kinds in turn; every fourth rejected answer has other images."""

    def __init__(self, transform=None, kinds=tuple(KINDS), size=24, paired=True):
        self.kinds, self.size, self.paired = list(kinds), size, paired

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        kind = self.kinds[index % len(self.kinds)]
        if not self.paired:
            return unpaired(kind, index)
        has_media = any(isinstance(part, tuple) for part in KINDS[kind][0])
        return pair(kind, index, other_images=has_media and index % 4 == 3)


class Transform(training_samples.Transform):
    """The same, with the limit that packing asks for."""

    def __init__(self, max_seq_len=80):
        self.max_seq_len = max_seq_len
