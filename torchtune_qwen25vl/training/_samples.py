"""Which samples a step trains on: the same ones on any number of workers and ranks.

The samples follow from the number of the step alone; what a sample draws at random follows from the
sample and the pass. So a run that knows the number of its step goes on exactly where it stopped.
"""

import functools
import random
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl.training._batches import StepCollate
from torchtune_qwen25vl.training._ends import leave_signals_to_the_run
from torchtune_qwen25vl.training._feeding import Fed, Feeding, Streams, index_of
from torchtune_qwen25vl.training._mixing import (
    Portion,
    keep_streams_in_order,
    order_in_window,
    places_of_pass,
)
from torchtune_qwen25vl.training._seeds import seed_of


class Key(NamedTuple):
    """Which sample, in which pass over the data.

    Attributes:
        place: index of the sample in the data set
        epoch: number of the pass
        counted: whether its labels count; those of a sample that only fills up a step do not
    """

    place: int
    epoch: int
    counted: bool = True


@dataclass(frozen=True)
class Share:
    """How the samples of a step are shared out.

    Args:
        samples: number of samples of one rank in one step
        rank: number of this rank
        world_size: number of ranks
    """

    samples: int
    rank: int = 0
    world_size: int = 1

    @property
    def step_samples(self) -> int:
        """Count the samples of all ranks in one step."""
        return self.samples * self.world_size

    def numbers(self, step: int) -> range:
        """Number this rank's samples of a step, counted from the start of the run."""
        first = step * self.step_samples + self.rank * self.samples
        return range(first, first + self.samples)


class TrainSampler(Sampler[list[Key]]):
    """An endless walk through the data, each pass in an order of its own.

    Args:
        num_samples: number of samples in a pass
        share: share of this rank
        steps: steps to give samples for
        shuffle: whether each pass is shuffled
        seed: seed of the shuffling
        portions: parts of a mixture, of which a pass has `num_samples` places in all
        window: number of places that follow each other and are shuffled among themselves, as those
            of a stream are; None to shuffle all
    """

    def __init__(
        self,
        num_samples: int,
        share: Share,
        steps: range,
        *,
        shuffle: bool,
        seed: int,
        portions: Sequence[Portion] = (),
        window: int | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.portions = portions
        self.window = window
        self.share = share
        self.steps = steps
        self.shuffle = shuffle
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._make_order)
        self._window_order = functools.lru_cache(maxsize=2)(self._make_window_order)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            yield [self._key(number) for number in self.share.numbers(step)]

    def _key(self, number: int) -> Key:
        epoch, place = divmod(number, self.num_samples)
        return Key(self._place(epoch, place), epoch)

    def _place(self, epoch: int, place: int) -> int:
        if not (self.shuffle or self.portions):
            return place
        if self.window is None:
            return int(self._order(epoch)[place])
        number, own = divmod(place, self.window)
        return number * self.window + int(self._window_order(epoch, number)[own])

    def _make_window_order(self, epoch: int, number: int) -> torch.Tensor:
        assert self.window is not None
        return order_in_window(number, self.window, self.num_samples, (self.seed, epoch))

    def _make_order(self, epoch: int) -> torch.Tensor:
        order = torch.arange(self.num_samples)
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.num_samples, generator=generator)
        if not self.portions:
            return order
        places = places_of_pass(self.portions, epoch, shuffle=self.shuffle, seed=self.seed)
        return places[keep_streams_in_order(order, self.portions)]


class ValidationSampler(Sampler[list[Key]]):
    """Every sample of a pass once; a rank that has no more repeats some that are not counted.

    Args:
        num_samples: number of samples in a pass
        share: share of this rank
        portions: parts of a mixture, of each of which the first places are taken
    """

    def __init__(self, num_samples: int, share: Share, portions: Sequence[Portion] = ()) -> None:
        self.num_samples = num_samples
        self.share = share
        self.places: Sequence[int] = range(num_samples)
        if portions:
            self.places = places_of_pass(portions, 0, shuffle=False, seed=0).tolist()

    def __len__(self) -> int:
        return -(-self.num_samples // self.share.step_samples)

    def __iter__(self) -> Iterator[list[Key]]:
        n = self.num_samples
        for step in range(len(self)):
            yield [Key(self.places[k % n], 0, counted=k < n) for k in self.share.numbers(step)]


class SeededDataset(Dataset):
    """A data set whose samples depend on their key alone, whatever they draw at random.

    Args:
        dataset: anything with samples by their index
        seed: seed of what samples draw
        empty: places, in ascending order, for which the data set has no sample; any other one
            stands there, and is not counted
    """

    def __init__(self, dataset: Any, seed: int, empty: Sequence[int] = ()) -> None:
        self.dataset = dataset
        self.seed = seed
        self.empty = empty

    def __getitem__(self, key: Key) -> Mapping[str, Any]:
        """Return the sample of a key, with labels ignored if it is not counted."""
        before_it = bisect_left(self.empty, key.place)
        is_empty = before_it < len(self.empty) and self.empty[before_it] == key.place
        index = index_of(key.place, self.empty, len(self.dataset))
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        seed = seed_of(self.seed, key.epoch, key.place)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            sample = self.dataset[index]
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
        if key.counted and not is_empty:
            return sample
        return {**sample, "labels": [CROSS_ENTROPY_IGNORE_IDX] * len(sample["tokens"])}


def make_loader(
    dataset: Any,
    sampler: Sampler[list[Key]],
    collate: StepCollate,
    *,
    seed: int,
    empty: Sequence[int] = (),
    streams: Streams | None = None,
    **options: Any,
) -> DataLoader:
    """Make a loader that yields one `StepBatches` after another, prepared by its workers.

    Args:
        dataset: anything with samples by their index
        sampler: sampler that yields the keys of each step
        collate: collate from the samples of a step to its batches
        seed: seed of what samples draw at random
        empty: places for which the data set has no sample, see `SeededDataset`
        streams: streams of the data set, read here and not by the workers; None if it has none
        **options: options of torch's DataLoader, such as num_workers or pin_memory
    """
    seeded: Dataset = SeededDataset(dataset, seed, empty)
    keys: Sampler = sampler
    if streams is not None:
        seeded, keys = Fed(seeded, streams), Feeding(sampler, streams)
    return DataLoader(
        seeded,
        batch_sampler=keys,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_the_run,
        generator=torch.Generator().manual_seed(seed),  # leaves torch's own generator alone
        **options,
    )


def seed_step(seed: int, step: int) -> None:
    """Seed what the model draws in a step of this rank (dropout).

    The seed follows from the number of the step, so that a run that was interrupted draws the same.
    """
    _, rank = utils.get_world_size_and_rank()
    torch.manual_seed(seed_of(seed, step, rank))
