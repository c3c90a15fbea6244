"""What is computed in which precision, against a plain loop under autocast."""

import pytest
import tiny
import torch
from torch.nn import functional as F

from parity.inputs import LAYOUTS, make_inputs
from torchtune_qwen25vl import _torchtune
from torchtune_qwen25vl.model import linear_log_probs
from torchtune_qwen25vl.training import computed_in, summed_loss

CPU = torch.device("cpu")
INPUTS = make_inputs(LAYOUTS["mixed batch"], tiny.IDS)
BATCH = {**INPUTS.ours, "labels": INPUTS.labels}


def plain_loss(model, batch):
    """All logits under autocast, as a plain loop has them."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs)
    wanted = _torchtune.targets(batch["labels"])
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum")


def gradients(model, loss):
    model.zero_grad()
    value = loss(model, BATCH)
    value.backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    return value.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_is_a_plain_loop_under_autocast(tied):
    model = tiny.model(tie_word_embeddings=tied).train()
    mixed = computed_in("bf16_mixed", CPU, model, summed_loss)
    value, grads = gradients(model, mixed)
    plain_value, plain_grads = gradients(model, plain_loss)
    exact_value, exact_grads = gradients(model, summed_loss)
    assert value == pytest.approx(plain_value, rel=1e-3)  # the plain loop rounds logits to bf16
    assert relative(grads, plain_grads) < 1e-2
    # and it is bf16 that was computed in: as far from fp32 as the plain loop is
    ours, theirs = relative(grads, exact_grads), relative(plain_grads, exact_grads)
    assert 1e-3 < ours < 1.5 * theirs
    assert value != exact_value


@pytest.mark.parametrize("precision", ["fp32", "bf16_stochastic", "bf16"])
def test_other_precisions_compute_in_what_weights_are_held_in(precision):
    model = tiny.model().train()
    value, grads = gradients(model, computed_in(precision, CPU, model, summed_loss))
    exact_value, exact_grads = gradients(model, summed_loss)
    assert value == exact_value
    assert torch.equal(grads, exact_grads)


def test_log_probabilities_are_products_in_bf16_too():
    hidden, weight = torch.randn(5, 16), torch.randn(30, 16, requires_grad=True)
    labels = torch.randint(30, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = linear_log_probs(hidden, weight, labels)
        logits = F.linear(hidden, weight).float()
    expected = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert (mixed - expected).abs().max() < 2e-2
    exact = linear_log_probs(hidden, weight, labels)
    assert not torch.equal(mixed, exact)
    mixed.sum().backward()
    assert weight.grad.dtype == torch.float32
