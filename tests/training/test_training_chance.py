"""Chance in samples: three generators, seeded by the sample and left as they were outside."""

import random

import numpy as np
import pytest
import torch

from torchtune_qwen25vl.training import _samples
from torchtune_qwen25vl.training._samples import Key, SeededDataset, seed_step

DRAWS = {
    "random": random.random,
    "numpy": np.random.random,
    "torch": lambda: float(torch.rand(())),
}


class Drawn:
    """A data set whose samples are drawn by one generator; the third fails."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 6

    def __getitem__(self, place):
        drawn = self.draw()
        if place == 3:
            raise ValueError("bad row")
        return {"tokens": [place], "labels": [place], "drawn": drawn}


@pytest.mark.parametrize("name", DRAWS)
def test_each_generator_is_seeded_by_sample_and_pass(name):
    data = SeededDataset(Drawn(DRAWS[name]), seed=0)
    first = data[Key(2, 0)]["drawn"]
    DRAWS[name]()  # chance from outside
    assert data[Key(2, 0)]["drawn"] == first
    others = [data[Key(2, 1)], data[Key(1, 0)], SeededDataset(data.dataset, seed=1)[Key(2, 0)]]
    assert len({first, *(other["drawn"] for other in others)}) == 4


@pytest.mark.parametrize("place", [2, 3])
@pytest.mark.parametrize("name", DRAWS)
def test_each_generator_goes_on_outside_as_if_no_sample_had_been_read(name, place):
    data = SeededDataset(Drawn(DRAWS[name]), seed=0)
    draws = []
    for reads in (False, True):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if reads and place == 3:
            with pytest.raises(ValueError, match="bad row"):
                data[Key(place, 0)]
        elif reads:
            data[Key(place, 0)]
        draws.append(DRAWS[name]())
    assert draws[0] == draws[1]


def test_ranks_draw_differently_in_a_step_and_again_alike(monkeypatch):
    def dropped(step, rank, seed=0):
        monkeypatch.setattr(_samples.utils, "get_world_size_and_rank", lambda: (2, rank))
        seed_step(seed, step)
        return float(torch.rand(()))

    keys = [(step, rank, seed) for step in (0, 1) for rank in (0, 1) for seed in (0, 1)]
    first = [dropped(*key) for key in keys]
    assert len(set(first)) == len(keys)
    assert [dropped(*key) for key in keys] == first
