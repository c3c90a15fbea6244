"""Products by oneDNN: the same numbers, gradients too, and where they are torch's."""

import pytest
import tiny
import torch
from counted import Counted
from torch.nn import functional as F

from torchtune_qwen25vl.model import linear_cross_entropy, linear_log_probs, products_by
from torchtune_qwen25vl.model._products import Linear, linear, multiply

FP32 = {"rtol": 1e-5, "atol": 1e-4}  # sums of up to 90 products in another order


def by_onednn(work):
    """Return what work returns with oneDNN, and how many products were oneDNN's."""
    with products_by("onednn", always=True), Counted() as counted:
        result = work()
    return result, counted.calls["_linear_pointwise"]


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 7), (3, 0)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("trained", "products"),
    [("", 1), ("x", 2), ("weight", 2), ("bias", 1), ("x weight bias", 3)],
)
def test_a_product_and_its_gradients_are_torch_s(shape, bias, trained, products):
    if trained == "bias" and not bias:
        return

    def outcome(product):
        torch.manual_seed(0)
        x, weight, shift = torch.randn(*shape, 48), torch.randn(90, 48), torch.randn(90)
        tensors = {"x": x, "weight": weight} | ({"bias": shift} if bias else {})
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in trained.split())
        out = product(*tensors.values())
        if out.requires_grad:
            (out * torch.randn(out.shape)).sum().backward()
        return [out, *(tensor.grad for tensor in tensors.values())]

    ours, counted = by_onednn(lambda: outcome(linear))
    assert counted == (products if 0 not in shape else 0)
    for mine, theirs in zip(ours, outcome(F.linear), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **FP32)


def test_a_gradient_of_other_strides_is_taken():
    x, weight = torch.randn(48, 5), torch.randn(90, 48, requires_grad=True)
    right = F.linear(x.T, weight).T.contiguous()
    ours, _ = by_onednn(lambda: linear(x.T, weight).T.contiguous())
    torch.testing.assert_close(ours, right, **FP32)
    slope = torch.randn(90, 5)
    (wanted,) = torch.autograd.grad(right, weight, slope)
    (found,) = torch.autograd.grad(ours, weight, slope)
    torch.testing.assert_close(found, wanted, **FP32)


def test_torch_multiplies_unless_it_is_told_otherwise():
    x, layer = torch.randn(5, 48), Linear(48, 90)
    with Counted() as counted:
        out = layer(x)
    assert counted.calls["_linear_pointwise"] == 0
    assert torch.equal(out, F.linear(x, layer.weight, layer.bias))
    by_onednn(lambda: layer(x))
    with Counted() as counted:
        layer(x)
    assert counted.calls["_linear_pointwise"] == 0, "the context is left"


@pytest.mark.parametrize("why", ["bf16", "autocast", "no rows"])
def test_what_onednn_cannot_do_torch_does(why):
    dtype = torch.bfloat16 if why == "bf16" else torch.float32
    layer = Linear(48, 90, dtype=dtype)
    x = torch.randn(0 if why == "no rows" else 5, layer.in_features, dtype=dtype)

    def work():
        with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
            return layer(x)

    out, counted = by_onednn(work)
    assert counted == 0
    assert out.dtype == (torch.bfloat16 if why == "autocast" else dtype)


@pytest.mark.parametrize(
    ("rows", "width", "gains"),
    [
        (1, 256, False),
        (2, 256, True),
        (8, 256, True),
        (9, 256, False),
        (127, 256, False),
        (128, 256, True),
        (128, 255, False),
    ],
)
def test_small_products_are_torch_s(rows, width, gains):
    with products_by("onednn"), Counted() as counted:
        linear(torch.randn(rows, 256), torch.randn(width, 256))
        linear(torch.randn(1, rows, width), torch.randn(256, width))
    assert counted.calls["_linear_pointwise"] == 2 * gains


def test_a_compiled_layer_is_compiled_whole():
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    layer, x = torch.compile(Linear(48, 90), backend=backend, fullgraph=True), torch.randn(5, 48)
    with products_by("onednn", always=True):
        layer(x)
    assert len(graphs) == 1
    assert "linear" in graphs[0]
    assert "mkldnn" not in graphs[0]


def test_multiply_writes_where_it_is_told():
    rows, weight, out = torch.randn(5, 48), torch.randn(90, 48), torch.empty(5, 90)
    result, counted = by_onednn(lambda: multiply(rows, weight, out=out))
    assert counted == 1
    assert result is out
    torch.testing.assert_close(out, rows @ weight.T, **FP32)


@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_log_probs])
def test_losses_are_the_same(loss):
    labels = torch.randint(90, (11,))

    def outcome():
        torch.manual_seed(0)
        hidden, weight = (torch.randn(n, 48, requires_grad=True) for n in (11, 90))
        value = loss(hidden, weight, labels, chunk_rows=4).sum()
        value.backward()
        return value, hidden.grad, weight.grad

    ours, counted = by_onednn(outcome)
    assert counted >= 6  # logits and the gradient of the rows, of three chunks
    for mine, theirs in zip(ours, outcome(), strict=True):
        torch.testing.assert_close(mine, theirs, **FP32)


@pytest.mark.parametrize("tied", [True, False])
def test_every_large_layer_of_a_model_is_reached(tied):
    model = tiny.model(tie_word_embeddings=tied)
    batch = tiny.inputs("image and video").ours
    layers = sum(isinstance(layer, Linear) for layer in model.modules())
    with torch.no_grad(), products_by("onednn", always=True), Counted() as counted:
        ours = model(**batch)
    assert counted.calls["_linear_pointwise"] == layers + tied
    with torch.no_grad():
        right = model(**batch)
    noise = 1e-5 * float(right.abs().max())  # of sums as large as these
    torch.testing.assert_close(ours, right, rtol=0, atol=noise)
