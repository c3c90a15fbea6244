"""Losses of preference against their formulas, written out with numbers; what they refuse."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from torchtune_qwen25vl.training._preference import LOSSES, Answers, read_loss, rewards

POLICY = [[-9.0, -6.0], [-2.0, -8.5], [-7.5, -1.0]]
REFERENCE = [[-9.5, -5.0], [-2.5, -4.0], [-6.0, -3.0]]
LENGTHS = [[4, 3], [2, 5], [3, 1]]
LIKED = [True, False, True]


def answers(rows=slice(None), *, reference=True):
    return Answers(
        torch.tensor(POLICY, dtype=torch.float64)[rows].requires_grad_(),
        torch.tensor(REFERENCE, dtype=torch.float64)[rows] if reference else None,
        torch.tensor(LENGTHS)[rows],
        torch.tensor(LIKED)[rows],
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def formula(name, c, r, c0, r0, n, m, **o):
    """A pair's loss: log-probabilities, those of the reference, lengths, options."""
    beta = o["beta"]
    if name in ("dpo", "mpo"):
        d, e = beta * ((c - c0) - (r - r0)), o.get("label_smoothing", 0.0)
        loss = -(1 - e) * math.log(sigmoid(d)) - e * math.log(sigmoid(-d))
        if name == "dpo":
            return loss
        quality = -math.log(sigmoid(beta * (c - c0))) - math.log(sigmoid(-beta * (r - r0)))
        a, b, g = (o.get(k, v) for k, v in WEIGHTS.items())
        return a * loss + b * quality - g * c / n
    if name == "ipo":
        return ((c - c0) / n - (r - r0) / m - 1 / (2 * beta)) ** 2
    if name == "hinge":
        return max(0.0, 1 - beta * ((c - c0) - (r - r0)))
    if name == "simpo":
        return -math.log(sigmoid(beta * (c / n - r / m) - o["gamma"]))
    assert name == "orpo"
    return -c / n - beta * math.log(sigmoid(log_odds(c / n) - log_odds(r / m)))


WEIGHTS = {"preference_weight": 0.8, "quality_weight": 0.2, "sft_weight": 1.0}
CASES = [
    ("dpo", {"beta": 0.3}),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("ipo", {"beta": 0.4}),
    ("hinge", {"beta": 0.3}),
    ("simpo", {"beta": 1.5, "gamma": 0.7}),
    ("orpo", {"beta": 0.25}),
    ("mpo", {"beta": 0.3}),
    ("mpo", {"beta": 0.3, "preference_weight": 0.5, "quality_weight": 0.7, "sft_weight": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_pairs_loss_is_its_formula(name, options):
    loss = read_loss({"name": name, **options})(answers())
    for row in range(3):
        (c, r), (c0, r0), (n, m) = POLICY[row], REFERENCE[row], LENGTHS[row]
        expected = formula(name, c, r, c0, r0, n, m, **options)
        assert loss[row].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_need_none(name):
    found = [LOSSES[name](answers(reference=given)) for given in (True, False)]
    assert torch.equal(*found)


@pytest.mark.parametrize(("liked_weight", "other_weight"), [(1.0, 1.0), (1.5, 0.5)])
def test_unpaired_answers_are_held_against_the_divergence_of_moved_ones(liked_weight, other_weight):
    weights = {"desirable_weight": liked_weight, "undesirable_weight": other_weight}
    loss = read_loss({"name": "kto", "beta": 0.3, **weights})
    made = answers(slice(1, 3))
    ratios = (torch.tensor(POLICY) - torch.tensor(REFERENCE))[1:].tolist()
    divergence = (ratios[0][1] + ratios[1][1]) / 2
    assert divergence < 0  # so it is 0
    not_liked, liked = ratios[0][0], ratios[1][0]
    expected = [
        other_weight * (1 - sigmoid(0.3 * -not_liked)),
        liked_weight * (1 - sigmoid(0.3 * liked)),
    ]
    assert loss(made).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_divergence_has_no_gradient_and_leaves_out_rows_without_a_moved_answer():
    policy = torch.tensor([[-2.0, -3.0], [-4.0, -1.0], [-3.0, 0.0]]).requires_grad_()
    lengths = torch.tensor([[2, 3], [4, 1], [3, 0]])
    made = Answers(policy, torch.full((3, 2), -4.0), lengths, torch.tensor([True, False, True]))
    loss = LOSSES["kto"](made, beta=0.5)
    z = (1.0 + 3.0) / 2
    expected = [1 - sigmoid(0.5 * (2 - z)), 1 - sigmoid(0.5 * (z - 0)), 1 - sigmoid(0.5 * (1 - z))]
    assert loss.tolist() == pytest.approx(expected, rel=1e-6)
    loss.sum().backward()
    assert policy.grad[:, 1].tolist() == [0, 0, 0]
    assert policy.grad[0, 0] < 0 < policy.grad[1, 0]


def test_rewards():
    made = answers()
    expected = 0.3 * (torch.tensor(POLICY) - torch.tensor(REFERENCE))
    torch.testing.assert_close(rewards(made, 0.3).float(), expected)
    assert not rewards(made, 0.3).requires_grad
    per_token = torch.tensor(POLICY) / torch.tensor(LENGTHS)
    torch.testing.assert_close(rewards(answers(reference=False), 2.0).float(), 2 * per_token)


def test_rows_are_selected_in_all_fields():
    kept = answers(reference=False)[torch.tensor([True, False, True])]
    assert kept.policy.tolist() == [POLICY[0], POLICY[2]]
    assert kept.lengths.tolist() == [LENGTHS[0], LENGTHS[2]]
    assert kept.liked.tolist() == [True, True]
    assert kept.reference is None


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({}, r"loss.name is one of \['dpo', .*\], got loss.name=None"),
        ({"name": "sigmoid"}, "got loss.name='sigmoid'"),
        ({"name": "dpo", "gamma": 1}, r"loss dpo has no keys \['gamma'\]; it takes \['beta', 'lab"),
        ({"name": "dpo", "beta": 0}, "loss.beta is a number of more than 0, got loss.beta=0"),
        ({"name": "dpo", "beta": "a"}, "loss.beta is a number of more than 0"),
        ({"name": "dpo", "label_smoothing": 0.5}, "loss.label_smoothing is a number from 0 to bel"),
        ({"name": "mpo", "sft_weight": -1}, "loss.sft_weight is a number from 0, got"),
        ({"name": "simpo", "gamma": math.inf}, "loss.gamma is a number from 0, got"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(section, said):
    with pytest.raises(ValueError, match=said):
        read_loss(OmegaConf.create(section))
