"""Log-probabilities of labelled tokens against log_softmax: values, gradients, what is held."""

import pytest
import torch
from test_loss import relative

from torchtune_qwen25vl.model import linear_log_probs

N, D, V = 45, 32, 500


def make(dtype=torch.float32, scale=1.0):
    """Hidden states, weight, labels, and what the gradient of each row is multiplied with."""
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(N, D, generator=generator)).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, labels, torch.randn(N, generator=generator)


def plain(hidden, weight, labels):
    return (hidden @ weight.T).log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def with_gradients(function, hidden, weight, labels, factors):
    log_probs = function(hidden, weight, labels)
    gradients = torch.autograd.grad((log_probs * factors).sum(), (hidden, weight))
    return log_probs.detach(), *gradients


def in_fp64(hidden, weight, labels, factors):
    exact = (x.detach().double().requires_grad_() for x in (hidden, weight))
    return with_gradients(plain, *exact, labels, factors.double())


@pytest.mark.parametrize("chunk_rows", [1, 7, 45, 1024])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_log_softmax_and_its_gradients(chunk_rows, scale):
    tensors = make(scale=scale)
    ours = with_gradients(lambda *t: linear_log_probs(*t, chunk_rows=chunk_rows), *tensors)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, in_fp64(*tensors), strict=True):
        assert relative(a, b) < 2e-6


def test_in_bf16_only_the_projection_is_rounded():
    hidden, weight, labels, _ = make(torch.bfloat16)
    rounded = (hidden @ weight.T).float().log_softmax(-1)
    expected = rounded.gather(-1, labels[:, None]).squeeze(-1)
    found = linear_log_probs(hidden, weight, labels, chunk_rows=16)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-6
    assert relative(found, rounded.bfloat16().gather(-1, labels[:, None]).squeeze(-1)) > 1e-4


def test_only_what_is_asked_for_has_a_gradient():
    hidden, weight, labels, _ = make()
    linear_log_probs(hidden, weight.detach(), labels).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not linear_log_probs(hidden, weight, labels).requires_grad


def test_no_label_at_all_gives_nothing_and_gradients_of_zero():
    hidden, weight, labels, _ = make()
    found = linear_log_probs(hidden[:0], weight, labels[:0])
    assert found.shape == (0,)
    found.sum().backward()
    assert weight.grad.abs().max() == 0


def test_holds_the_logits_of_one_chunk(monkeypatch):
    """Neither direction makes more of the logits; [d, v] is the weight."""
    hidden, weight, labels, factors = make()
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,) and len(out) != D:
                largest.append(out.shape[0])
            return out

    with Sizes():
        with_gradients(
            lambda *t: linear_log_probs(*t, chunk_rows=8), *(hidden, weight, labels), factors
        )
    assert max(largest) == 8
    with Sizes():
        with_gradients(plain, hidden, weight, labels, factors)
    assert max(largest) == N


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels, _ = make()
    with pytest.raises(ValueError, match=r"needs hidden \[n, d\].*\[45, 32\].*\[44\]"):
        linear_log_probs(hidden, weight, labels[1:])


@pytest.mark.parametrize(("temperature", "banned"), [(0.6, ()), (1.0, (3, 499)), (1.7, (0,))])
def test_temperature_and_banned_tokens_are_those_of_a_sampler(temperature, banned):
    hidden, weight, labels, factors = make()
    labels[torch.isin(labels, torch.tensor([0, 3, 499]))] = 5

    def expected(hidden, weight, labels):
        logits = (hidden @ weight.T) / temperature
        logits = logits.index_fill(-1, torch.tensor(banned, dtype=torch.long), -torch.inf)
        return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)

    ours = with_gradients(
        lambda *t: linear_log_probs(*t, temperature=temperature, banned=banned, chunk_rows=7),
        *(hidden, weight, labels, factors),
    )
    exact = (x.detach().double().requires_grad_() for x in (hidden, weight))
    right = with_gradients(expected, *exact, labels, factors.double())
    unlike = in_fp64(hidden, weight, labels, factors)
    for a, b, c in zip(ours, right, unlike, strict=True):
        assert relative(a, b) < 2e-6
        assert relative(c, b) > 1e-4
