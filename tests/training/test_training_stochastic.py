"""AdamW with stochastic rounding: weights in bf16 move, on average by what they should."""

import tiny
import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune import config
from training_on_ranks import RECIPE
from training_samples import sample

from torchtune_qwen25vl.training import (
    StepCollate,
    StochasticAdamW,
    parameter_groups,
    read_parts,
    train_step,
)
from torchtune_qwen25vl.training._stochastic import round_stochastically

STEPS = 10  # in which 3 % of the weights move by torch's AdamW, 34 % by ours: as far as in fp32
PLAIN = {"_component_": "torch.optim.AdamW"}


def shipped():
    return OmegaConf.load(RECIPE.parent / "configs" / "finetune_full.yaml")


def update(optimizer, dtype):
    """Train a few steps at the rates of finetune_full; how far each weight of a matrix went."""
    model = tiny.model().to(torch.bfloat16).to(dtype).train()
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, read_parts(shipped().parts))
    made = config.instantiate(OmegaConf.create(optimizer), groups)
    torch.manual_seed(0)
    for _ in range(STEPS):  # on one batch, so that the updates point one way
        (batch,) = StepCollate(1007, batch_size=1, pack_to=None)([sample("image", 0)]).batches
        train_step(model, made, [batch])
    return torch.cat(
        [
            (p.detach().float() - before[name]).flatten()
            for name, p in model.named_parameters()
            if p.ndim == 2 and "embeddings" not in name
        ]
    )


def test_weights_in_bf16_move_with_the_optimizer_of_the_configs():
    """By torch's AdamW few do, and they stay far behind what they do in fp32."""
    fp32 = update(PLAIN, torch.float32)
    assert (fp32 != 0).float().mean() > 0.99

    def gone(optimizer):
        way = update(optimizer, torch.bfloat16)
        return float((way != 0).float().mean()), float((way * fp32).sum() / fp32.square().sum())

    share, distance = gone(shipped().optimizer)
    plain_share, plain_distance = gone(PLAIN)
    assert abs(distance - 1) < 0.1
    assert plain_distance < 0.1
    assert share > 5 * plain_share


def test_rounding_is_right_on_average():
    torch.manual_seed(0)
    exact = torch.tensor([1 + 0.3 / 128, -1 - 0.3 / 128, 3e-5, 0.0, 5.0]).repeat(200_000, 1)
    found = round_stochastically(exact)
    assert found.dtype == torch.bfloat16
    below, above = exact[0].bfloat16().float(), found.float().mean(0)
    assert (above - exact[0]).abs().max() < 1e-4 * exact[0].abs().max()
    assert (below - exact[0]).abs().max() > 1e-3, "rounding to nearest would pass"
    assert (found[:, 3:] == exact[:, 3:]).all(), "what bf16 holds stays as it is"


def test_in_fp32_it_is_the_adamw_of_torch():
    def trained(optimizer):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        made = optimizer(layer.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
        for _ in range(5):
            layer(torch.randn(4, 8)).square().sum().backward()
            made.step()
            made.zero_grad()
        return layer.weight.detach()

    ours, theirs = trained(StochasticAdamW), trained(torch.optim.AdamW)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (theirs - trained(torch.optim.Adam)).abs().max() > 1e-3


def test_the_same_seed_rounds_alike():
    def trained(seed):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64).bfloat16()
        made = StochasticAdamW(layer.parameters(), lr=1e-5)
        torch.manual_seed(seed)
        layer(torch.ones(1, 64, dtype=torch.bfloat16)).sum().backward()
        made.step()
        return layer.weight.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
