"""Divergence from a teacher against plain formulas in fp64: values, gradients, what is held."""

import pytest
import torch
from test_loss import relative

from torchtune_qwen25vl.model import linear_divergence

N, D, E, V = 23, 32, 24, 300
NAMES = ("forward_kl", "reverse_kl", "jsd")


def make(rows=V, teacher_rows=V, dtype=torch.float32, scale=1.0):
    """The student's hidden states and weight, the teacher's, and what each row is multiplied by."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    student = scale * normal(N, D), normal(rows, D) / D**0.5
    teacher = scale * normal(N, E), normal(teacher_rows, E) / E**0.5
    student = [x.to(dtype).requires_grad_() for x in student]
    return *student, *(x.to(dtype) for x in teacher), normal(N)


def plain(hidden, weight, teacher_hidden, teacher_weight, name, beta, temperature):
    """By torch's own kl_div, whose input is what is held against the target."""
    rows = min(len(weight), len(teacher_weight))
    ours = ((hidden @ weight[:rows].T) / temperature).log_softmax(-1)
    theirs = ((teacher_hidden @ teacher_weight[:rows].T) / temperature).log_softmax(-1)

    def kl(target, against):
        return torch.nn.functional.kl_div(against, target, log_target=True, reduction="none").sum(
            -1
        )

    if name == "forward_kl":
        return kl(theirs, ours)
    if name == "reverse_kl":
        return kl(ours, theirs)
    mixture = ((1 - beta) * ours.exp() + beta * theirs.exp()).log()
    return beta * kl(theirs, mixture) + (1 - beta) * kl(ours, mixture)


def with_gradients(function, hidden, weight, *rest):
    *teacher, factors = rest
    found = function(hidden, weight, *teacher)
    gradients = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    return found.detach(), *gradients


def in_fp64(tensors, *options):
    exact = [x.detach().double() for x in tensors]
    exact[:2] = [x.requires_grad_() for x in exact[:2]]
    return with_gradients(lambda *t: plain(*t, *options), *exact)


@pytest.mark.parametrize("chunk_rows", [7, 1024])
@pytest.mark.parametrize("rows", [(V, V), (V, V + 13), (V + 13, V)])
@pytest.mark.parametrize(
    ("name", "beta", "temperature"),
    [("forward_kl", 0.5, 1.0), ("reverse_kl", 0.5, 2.5), ("jsd", 0.3, 0.7), ("jsd", 0.8, 1.0)],
)
def test_equals_the_plain_formula_and_its_gradients(name, beta, temperature, rows, chunk_rows):
    tensors = make(*rows)
    options = {"name": name, "beta": beta, "temperature": temperature, "chunk_rows": chunk_rows}
    ours = with_gradients(lambda *t: linear_divergence(*t, **options), *tensors)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, in_fp64(tensors, name, beta, temperature), strict=True):
        assert relative(a, b) < 3e-6


def test_the_formula_is_not_another_one():
    """The cases above would see a wrong side, temperature or share: all differ by far."""
    tensors = make()
    right = in_fp64(tensors, "jsd", 0.3, 0.7)
    for other in [("jsd", 0.7, 0.7), ("jsd", 0.3, 1.0), ("forward_kl", 0.3, 0.7)]:
        assert relative(in_fp64(tensors, *other)[1], right[1]) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_logits_far_apart_stay_finite(name):
    tensors = make(scale=300.0)
    found = with_gradients(lambda *t: linear_divergence(*t, name=name), *tensors)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_not_divergent_from_itself(name):
    hidden, weight, *_ = make()
    found = linear_divergence(hidden, weight, hidden, weight, name=name)
    assert found.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert gradient.abs().max() < 1e-6


def test_in_bf16_only_the_projections_are_rounded():
    hidden, weight, teacher_hidden, teacher_weight, _ = make(dtype=torch.bfloat16)
    ours = (hidden @ weight.T).float().log_softmax(-1)
    theirs = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1)
    found = linear_divergence(hidden, weight, teacher_hidden, teacher_weight)
    assert found.dtype == torch.float32
    assert relative(found, expected) < 1e-5


def test_only_the_student_has_gradients():
    hidden, weight, teacher_hidden, teacher_weight, _ = make()
    teacher_hidden.requires_grad_()
    linear_divergence(hidden, weight.detach(), teacher_hidden, teacher_weight).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert teacher_hidden.grad is None


def test_no_row_at_all_gives_nothing_and_gradients_of_zero():
    hidden, weight, teacher_hidden, teacher_weight, _ = make()
    linear_divergence(hidden[:0], weight, teacher_hidden[:0], teacher_weight).sum().backward()
    assert weight.grad.abs().max() == 0


def test_holds_the_logits_of_one_chunk():
    """Neither direction makes more of either model's logits; [d, v] is a weight."""
    *tensors, factors = make()
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else [out]:
                if isinstance(x, torch.Tensor) and x.ndim == 2 and V in x.shape:
                    largest.append(min(x.shape))
            return out

    with Sizes():
        found = linear_divergence(*tensors, name="jsd", chunk_rows=5)
        torch.autograd.grad((found * factors).sum(), tensors[:2])
    assert set(largest) <= {3, 5, D, E}  # 23 rows are four chunks of 5 and one of 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_hidden": torch.zeros(N - 1, E)}, "as many rows of both"),
        ({"name": "kl"}, "one of .*'forward_kl'"),
        ({"weight": torch.zeros(V, D + 1)}, "the student's hidden"),
        ({"teacher_weight": torch.zeros(V, E + 1)}, "the teacher's hidden"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said):
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    given = dict(zip(names, make(), strict=False))
    with pytest.raises(ValueError, match=said):
        linear_divergence(**{**given, **changes})
