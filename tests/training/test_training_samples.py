"""Which samples a step trains on."""

import random

import numpy as np
import pytest
import torch
from training_samples import Samples, Transform

from torchtune_qwen25vl.training import (
    Share,
    StepCollate,
    TrainSampler,
    ValidationSampler,
    make_loader,
    seed_step,
)
from torchtune_qwen25vl.training._samples import Key, SeededDataset


def places(num_samples, share, steps, **options):
    options = {"shuffle": True, "seed": 3} | options
    return [
        key.place for keys in TrainSampler(num_samples, share, steps, **options) for key in keys
    ]


def test_each_pass_has_every_sample_once_in_an_order_of_its_own():
    seen = places(10, Share(5), range(6))
    passes = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert seen != places(10, Share(5), range(6), seed=4)
    assert places(10, Share(5), range(2), shuffle=False) == list(range(10))


def test_a_step_may_span_two_passes():
    keys = [
        key for keys in TrainSampler(3, Share(2), range(3), shuffle=False, seed=0) for key in keys
    ]
    assert [(key.epoch, key.place) for key in keys] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_a_run_that_begins_later_sees_what_it_would_have_seen():
    assert places(7, Share(3), range(4, 9)) == places(7, Share(3), range(9))[4 * 3 :]


def test_ranks_share_the_samples_of_a_step():
    one = list(TrainSampler(11, Share(6), range(4), shuffle=True, seed=0))
    ranks = [
        list(TrainSampler(11, Share(2, rank, 3), range(4), shuffle=True, seed=0))
        for rank in range(3)
    ]
    assert one == [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_samples", [1, 5, 6, 13])
def test_validation_counts_every_sample_once_on_equally_many_steps(num_samples):
    ranks = [list(ValidationSampler(num_samples, Share(2, rank, 3))) for rank in range(3)]
    assert len({len(steps) for steps in ranks}) == 1
    keys = [key for steps in ranks for step in steps for key in step]
    assert sorted(key.place for key in keys if key.counted) == list(range(num_samples))


def test_samples_that_are_not_counted_have_no_labels():
    data = SeededDataset(Samples(), seed=0)
    assert (np.asarray(data[Key(0, 0)]["labels"]) != -100).any()
    assert (np.asarray(data[Key(0, 0, counted=False)]["labels"]) == -100).all()


def test_what_a_sample_draws_depends_on_its_key_alone():
    data = SeededDataset(Samples(augment=True), seed=0)
    random.seed(1)
    torch.manual_seed(1)
    state = random.getstate(), torch.get_rng_state()
    first = data[Key(2, 0)]["tokens"]
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    data[Key(1, 0)]
    assert torch.equal(data[Key(2, 0)]["tokens"], first)
    assert not torch.equal(data[Key(2, 1)]["tokens"], first)
    other = SeededDataset(Samples(augment=True), seed=1)
    assert not torch.equal(other[Key(2, 0)]["tokens"], first)


def test_workers_change_nothing():
    collate = StepCollate(Transform.pad_id, batch_size=2, pack_to=None)
    loaded = []
    for workers in (0, 2):
        sampler = TrainSampler(24, Share(4), range(3), shuffle=True, seed=0)
        torch.manual_seed(7)
        loader = make_loader(Samples(augment=True), sampler, collate, seed=5, num_workers=workers)
        loaded.append([batch for step in loader for batch in step.batches])
        assert torch.initial_seed() == 7
    for alone, with_workers in zip(*loaded, strict=True):
        assert alone.keys() == with_workers.keys()
        assert torch.equal(alone["tokens"], with_workers["tokens"])
        assert torch.equal(alone["labels"], with_workers["labels"])


def test_a_step_draws_the_same_whatever_came_before():
    def draw(step, seed=0):
        seed_step(seed, step)
        return torch.rand(3)

    first = draw(5)
    assert not torch.equal(draw(6), first)
    assert not torch.equal(draw(5, seed=1), first)
    assert torch.equal(draw(5), first)
