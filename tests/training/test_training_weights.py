"""Weights of labels in a step: the mean is sum(w * ce) / sum(w), and nothing else changes."""

import pytest
import tiny
import torch
from torch.nn import functional as F
from training_samples import Transform, sample

from torchtune_qwen25vl._torchtune import targets
from torchtune_qwen25vl.training import (
    StepCollate,
    equal_numbers,
    mean_loss,
    summed_loss,
    train_step,
)

CPU = torch.device("cpu")


def samples(weighted=True):
    """Three samples of random weights, and one without."""
    made = [sample(kind, seed) for seed, kind in enumerate(("text", "image", "video", "short"))]
    generator = torch.Generator().manual_seed(0)
    for one in made[:3] if weighted else ():
        weights = torch.rand(len(one["tokens"]), generator=generator) + 0.1
        one["label_weights"] = torch.where(one["labels"] != -100, weights, 0)
    return made


def collate(made, pack_to=None):
    return StepCollate(Transform.pad_id, batch_size=2, pack_to=pack_to)(made)


def expected_loss(model, made):
    """The formula, one sample after the other."""
    total, weight = 0.0, 0.0
    for one in made:
        (batch,) = collate([{k: v for k, v in one.items() if k != "label_weights"}]).batches
        labels = targets(batch.pop("labels"))
        batch.pop("label_rows")
        losses = F.cross_entropy(model(**batch)[0], labels[0], reduction="none")
        own = one.get("label_weights", (one["labels"] != -100).float())
        weights = targets(own[None], 0)[0]
        total, weight = total + (losses * weights).sum(), weight + weights.sum()
    return total / weight


@pytest.mark.parametrize("pack_to", [None, 64])
def test_the_mean_is_that_of_weights(pack_to):
    made, model = samples(), tiny.model().train()
    data = collate(made, pack_to)
    with torch.no_grad():
        expected = float(expected_loss(model, made))
        plain = float(expected_loss(model, samples(weighted=False)))
    assert abs(plain - expected) > 1e-3
    model.requires_grad_(True)
    found = mean_loss(model, data.batches, device=CPU)
    assert found == pytest.approx(expected, rel=1e-5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = train_step(model, optimizer, data.batches)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    weights = sum(float(one["label_weights"].sum()) for one in made[:3])
    short = int((made[3]["labels"] != -100).sum())
    assert result.labels == pytest.approx(weights + short, rel=1e-6)


def test_gradients_are_those_of_the_formula():
    made, model = samples(), tiny.model().train()
    expected_loss(model, made).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    data = collate(made, 64)
    total = sum(batch.get("total_weight", len(batch["label_rows"])) for batch in data.batches)
    (sum(summed_loss(model, batch) for batch in data.batches) / total).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-6, rtol=1e-4)


def test_equal_weights_change_nothing_but_rounding():
    model = tiny.model().train()
    plain = samples(weighted=False)
    double = [{**one, "label_weights": 2.0 * (one["labels"] != -100)} for one in plain]
    losses = [mean_loss(model, collate(made).batches, device=CPU) for made in (plain, double)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert not any("label_weights" in batch for batch in collate(plain).batches)


def test_weights_below_one_in_all_are_no_less_a_mean():
    model = tiny.model().train()
    (one,) = samples()[:1]
    small = {**one, "label_weights": one["label_weights"] * 1e-3}
    losses = [mean_loss(model, collate([made]).batches, device=CPU) for made in (one, small)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    steps = [
        train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), collate([made]).batches)
        for made in (one, small)
    ]
    assert steps[1].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-4)


def test_a_rank_with_fewer_rows_repeats_its_last_without_weight(monkeypatch):
    data = collate(samples())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number, _: number.fill_(4))
    more = equal_numbers(data, CPU).batches[2:]
    assert [batch["total_weight"] for batch in more] == [0.0, 0.0]
    assert summed_loss(tiny.model().train(), more[0]).item() == 0


def test_the_other_kernel_refuses_weights():
    with pytest.raises(ValueError, match="'liger' knows no weights of labels"):
        summed_loss(tiny.model().train(), collate(samples()).batches[0], kernel="liger")
