"""Muon and AdamW as one optimiser."""

import pytest
import torch

from torchtune_qwen25vl.training import MuonAdamW


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (6,), (3, 8), (8,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizers, weights):
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_matrices_take_the_steps_of_muon_and_the_rest_those_of_adamw():
    ours, theirs = parameters(), parameters()
    groups = [
        {"params": ours[:2], "lr": 0.1, "weight_decay": 0.3, "name": "first"},
        {"params": ours[2:], "lr": 0.02},
    ]
    optimizer = MuonAdamW(groups, momentum=0.9, betas=(0.8, 0.95))
    take_steps([optimizer], ours)
    scaled = {"momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    separate = [
        torch.optim.Muon([theirs[0]], lr=0.1, weight_decay=0.3, **scaled),
        torch.optim.Muon([theirs[2]], lr=0.02, weight_decay=0.0, **scaled),
        torch.optim.AdamW([theirs[1]], lr=0.1, weight_decay=0.3, betas=(0.8, 0.95)),
        torch.optim.AdamW([theirs[3]], lr=0.02, weight_decay=0.0, betas=(0.8, 0.95)),
    ]
    take_steps(separate, theirs)
    for mine, right, before in zip(ours, theirs, parameters(), strict=True):
        assert torch.equal(mine, right)
        assert not torch.equal(mine, before)
    assert {group["name"] for group in optimizer.param_groups if "name" in group} == {"first"}


@pytest.mark.parametrize("kept", [slice(0, 4, 2), slice(1, 4, 2)], ids=["matrices", "the rest"])
def test_one_kind_alone(kept):
    weights = parameters()[kept]
    before = [weight.detach().clone() for weight in weights]
    take_steps([MuonAdamW([{"params": weights, "lr": 0.1}])], weights)
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
