"""Advantages, losses, rewards and samples of the recipe policy."""

import math

import pytest
import torch

from torchtune_qwen25vl.generation import Ended
from torchtune_qwen25vl.training import (
    advantages,
    answered,
    box_iou,
    exact_match,
    json_form,
    length,
    pattern,
    read_policy_loss,
)
from torchtune_qwen25vl.training._policy import Drawn, answer_losses

CPU = torch.device("cpu")
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [2.0, 2.0, 2.0], [0.0, 3.0, 0.0]])
MAX_NEW = 9


def drawn(reference=True):
    """Five answers of 1 to 6 tokens, some of whose ratios are clipped, in fp64."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 6, 1, 4, 2])
    inside = torch.arange(6) < lengths[:, None]

    def values():
        return torch.where(inside, -torch.rand(5, 6, generator=generator).double(), 0)

    return Drawn(
        values().requires_grad_(),
        values(),
        values() if reference else None,
        lengths,
        torch.tensor([0.7, -1.2, 0.4, -0.1, 1.9]).double(),
    )


def plain(answers, name, low, high, beta):
    """Token by token, as the papers write it."""
    losses = []
    for a, n in enumerate(answers.lengths.tolist()):
        worth = answers.advantages[a]
        log_ratios = [answers.policy[a, t] - answers.before[a, t] for t in range(n)]
        if name == "gspo":
            log_ratios = [sum(log_ratios) / n] * n
        tokens = []
        for t, log_ratio in enumerate(log_ratios):
            ratio = log_ratio.exp()
            kept = ratio.clamp(1 - low, 1 + high)
            loss = -min(ratio * worth, kept * worth)
            if answers.reference is not None:
                apart = answers.reference[a, t] - answers.policy[a, t]
                loss = loss + beta * (apart.exp() - apart - 1)
            tokens.append(loss)
        by = {"dapo": 1, "dr_grpo": MAX_NEW}.get(name, n)
        losses.append(sum(tokens) / by)
    return torch.stack(losses)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_losses_and_gradients_are_those_of_the_papers(name, reference):
    answers = drawn(reference)
    options = {"name": name, "clip_low": 0.1, "clip_high": 0.3, "beta": 0.2 if reference else 0.0}
    losses, figures = answer_losses(answers, read_policy_loss(options), MAX_NEW)
    expected = plain(answers, name, 0.1, 0.3, 0.2)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(x.sum(), answers.policy)[0] for x in (losses, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert 0 < figures["clipped"] < 16
    assert ("kl" in figures) == reference
    others = {"grpo", "dr_grpo", "dapo", "gspo"} - {name}
    for other in others:
        wrong = torch.autograd.grad(plain(answers, other, 0.1, 0.3, 0.2).sum(), answers.policy)[0]
        assert (wrong - ours).abs().max() > 1e-2


def test_what_stands_behind_an_answer_makes_no_difference():
    answers = drawn()
    beyond = ~answers.is_token
    dirty = Drawn(
        answers.policy.detach().masked_fill(beyond, 50.0).requires_grad_(),
        answers.before.masked_fill(beyond, -70.0),
        answers.reference.masked_fill(beyond, 90.0),
        *(answers.lengths, answers.advantages),
    )
    loss = read_policy_loss({"name": "grpo", "beta": 0.3})
    for one, other in zip(
        (answer_losses(answers, loss, MAX_NEW)[0],),
        (answer_losses(dirty, loss, MAX_NEW)[0],),
        strict=True,
    ):
        assert torch.equal(one, other)
    (gradient,) = torch.autograd.grad(answer_losses(dirty, loss, MAX_NEW)[0].sum(), dirty.policy)
    assert gradient[beyond].abs().max() == 0


def test_the_first_update_is_on_policy():
    answers = drawn()
    before = answers.policy.detach()
    same = Drawn(answers.policy, before, before, answers.lengths, answers.advantages)
    losses, figures = answer_losses(same, read_policy_loss({"beta": 0.5}), MAX_NEW)
    assert figures["clipped"] == 0
    assert figures["kl"] == 0
    torch.testing.assert_close(losses, -answers.advantages, rtol=1e-12, atol=0)


def test_advantages_are_held_against_their_group():
    found = advantages(REWARDS, "group", CPU)
    std = math.sqrt((0.25 + 0.25 + 0) / 2)
    assert found[0].tolist() == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0.0])
    assert found[1].tolist() == [0.0, 0.0, 0.0]
    assert found.sum(1).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert advantages(REWARDS, "none", CPU)[2].tolist() == [-1.0, 2.0, -1.0]
    whole = advantages(REWARDS, "batch", CPU)
    assert whole[2].tolist() == pytest.approx(
        (torch.tensor([-1.0, 2.0, -1.0]) / (REWARDS.std() + 1e-4)).tolist()
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "ppo"}, "loss.name is one of grpo, dr_grpo, dapo, gspo"),
        ({"epsilon": 0.2}, r"loss has no keys \['epsilon'\]"),
        ({"clip_low": 1.5}, "loss.clip_low is between 0 and 1"),
        ({"clip_high": 0}, "loss.clip_high is a number of more than 0"),
        ({"beta": "a"}, "loss.beta is a number"),
        ({"scale_rewards": True}, "loss.scale_rewards is one of group, batch, none"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        read_policy_loss(options)


def test_an_answer_is_trained_on_as_it_was_drawn():
    prompt = {
        "tokens": torch.tensor([5, 6, 7]),
        "input_pos": torch.tensor([[0, 0, 0], [1, 3, 2], [4, 4, 4]]),
        "row": {},
    }
    made = answered(prompt, Ended(0, [8, 9], "stop"), counted=True)
    assert made["tokens"].tolist() == [5, 6, 7, 8, 9]
    assert made["input_pos"][3:].tolist() == [[5, 5, 5], [6, 6, 6]]
    assert (made["labels"] != -100).sum() == 2
    unread = answered(prompt, Ended(0, [8, 9], "stop"), counted=False)
    assert (unread["labels"] == -100).all()


@pytest.mark.parametrize(
    ("reward", "answer", "row", "expected"),
    [
        (exact_match(), "A  red box.", {"reference": "a red box"}, 1.0),
        (exact_match(), "a red bo", {"reference": "a red box"}, 0.0),
        (exact_match(column="all"), "two", {"all": ["2", "two"]}, 1.0),
        (exact_match(), "1,000", {"reference": "1000"}, 1.0),
        (pattern(regex=r"<think>.*</think>.+", whole=True), "<think>a\n</think>b", {}, 1.0),
        (pattern(regex="b+", whole=True), "abb", {}, 0.0),
        (pattern(regex="b+"), "abb", {}, 1.0),
        (json_form(keys=["bbox_2d"]), '```json\n[{"bbox_2d": [1]}]\n```', {}, 1.0),
        (json_form(keys=["bbox_2d"]), '[{"box": [1]}]', {}, 0.0),
        (json_form(), "[1", {}, 0.0),
        (
            box_iou(),
            '[{"bbox_2d": [0, 0, 10, 10]}]',
            {"reference": '{"bbox_2d": [5,0,15,10]}'},
            1 / 3,
        ),
        (
            box_iou(threshold=0.5),
            '"bbox_2d": [0,0,9,10]',
            {"reference": '"bbox_2d": [0,0,10,10]'},
            1.0,
        ),
        (box_iou(column="box"), "no box", {"box": [0, 0, 1, 1]}, 0.0),
        (box_iou(column="box"), '"bbox_2d": [3, 3, 1, 1]', {"box": [0, 0, 1, 1]}, 0.0),
        (length(most=2), "one two", {}, 1.0),
        (length(most=2), "one two three", {}, 0.0),
    ],
)
def test_rewards(reward, answer, row, expected):
    assert reward("prompt", answer, row) == pytest.approx(expected)


def test_a_reward_of_a_column_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match=r"reads the column 'answer', .* it has \['a', 'b'\]"):
        exact_match(column="answer")("", "x", {"a": 1, "b": 2})
