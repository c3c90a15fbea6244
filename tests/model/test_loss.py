"""The loss of labelled rows against the plain one: value, gradients, and what it holds."""

import sys

import pytest
import tiny
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets._sft import SFTTransform
from training_samples import from_dataset

from torchtune_qwen25vl import _torchtune
from torchtune_qwen25vl._torchtune import labelled_rows
from torchtune_qwen25vl.model import _loss
from torchtune_qwen25vl.model._loss import LabelledRowsLoss, linear_cross_entropy

IGNORE = CROSS_ENTROPY_IGNORE_IDX
B, S, D, V = 3, 40, 32, 500


def make(share=0.25, dtype=torch.float32, scale=1.0):
    """Hidden states and weight that ask for gradients, and labels for this share of the rows."""
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(B, S, D, generator=generator)).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) >= share] = IGNORE
    return hidden, weight, labels


def plain(hidden, weight, labels):
    logits = (hidden @ weight.T).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def in_fp64(hidden, weight, labels, factor=1.0):
    """The plain loss and its gradients without rounding, which in fp32 is up to 6.9e-7 of them."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))

    def loss(hidden, weight, labels):
        logits = hidden @ weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    return with_gradients(loss, hidden, weight, labels, factor)


def with_gradients(loss_fn, hidden, weight, labels, factor=1.0):
    loss = loss_fn(hidden, weight, labels)
    return loss.detach(), *torch.autograd.grad(loss * factor, (hidden, weight))


def relative(ours, theirs):
    """Largest element-wise difference over the largest element."""
    with torch.no_grad():
        return float((ours - theirs).abs().max() / theirs.abs().max())


def chunked(chunk_rows):
    return lambda *tensors: linear_cross_entropy(*tensors, chunk_rows=chunk_rows)


@pytest.mark.parametrize("share", [0.02, 0.25, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1024])
def test_linear_cross_entropy_equals_the_plain_loss(share, chunk_rows):
    tensors = make(share)
    ours = with_gradients(chunked(chunk_rows), *tensors, factor=37.0)
    for a, b in zip(ours, in_fp64(*tensors, factor=37.0), strict=True):
        assert relative(a, b) < 1e-6


def test_large_logits_do_not_overflow():
    tensors = make(scale=100.0)
    assert float((tensors[0] @ tensors[1].T).detach().max()) > 300  # exp(89) is inf in fp32
    ours = with_gradients(chunked(64), *tensors)
    for a, b in zip(ours, with_gradients(plain, *tensors), strict=True):
        assert relative(a, b) < 1e-6


def test_the_comparison_sees_one_label_too_many():
    hidden, weight, labels = make()
    wrong = labels.clone()
    wrong[0, 0] = 5 if labels[0, 0] == IGNORE else IGNORE
    ours = with_gradients(linear_cross_entropy, hidden, weight, wrong)
    for a, b in zip(ours, in_fp64(hidden, weight, labels), strict=True):
        assert relative(a, b) > 1e-4


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_wanted_gradients_are_made(frozen):
    hidden, weight, labels = make()
    expected = in_fp64(hidden, weight, labels)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, labels)
    assert relative(loss, expected[0]) < 1e-6
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
    for tensor, gradient in ((hidden, expected[1]), (weight, expected[2])):
        assert (tensor.grad is not None) == tensor.requires_grad
        assert tensor.grad is None or relative(tensor.grad, gradient) < 1e-6


def test_no_grad_makes_no_gradients(monkeypatch):
    hidden, weight, labels = make()
    seen = []
    chunk = _loss._chunk
    monkeypatch.setattr(_loss, "_chunk", lambda *args: seen.append(args[-3:-1]) or chunk(*args))
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels)
    assert seen == [(None, None)]


def test_bf16_is_as_exact_as_the_plain_loss():
    """Against fp32 of the same rounded numbers, our error is at most 1.1 of the plain one's."""
    tensors = make(dtype=torch.bfloat16)
    rounded = [t.detach().float().requires_grad_() for t in tensors[:2]]
    exact = with_gradients(plain, *rounded, tensors[2])
    ours = with_gradients(linear_cross_entropy, *tensors)
    theirs = with_gradients(plain, *tensors)
    for a, b, reference in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - reference).norm() <= 1.1 * (b.float() - reference).norm() + 1e-7


def test_a_second_backward_is_refused_rather_than_wrong():
    hidden, weight, labels = make()
    loss = linear_cross_entropy(hidden, weight, labels)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_chunks_bound_the_logits(monkeypatch):
    sizes = []
    chunk = _loss._chunk
    monkeypatch.setattr(_loss, "_chunk", lambda *args: sizes.append(len(args[0])) or chunk(*args))
    hidden, weight, labels = make(share=1.0)
    linear_cross_entropy(hidden, weight, labels, chunk_rows=50)
    assert sizes == [50, 50, 20]


def no_labels(hidden, weight):
    labels = torch.full((B, S), IGNORE)
    rows = hidden[labelled_rows(labels)]
    yield lambda: linear_cross_entropy(hidden, weight, labels)
    yield lambda: LabelledRowsLoss()(rows @ weight.T, labels.flatten())


@pytest.mark.parametrize("k", [0, 1])
def test_no_labels_give_zero_and_zero_gradients(k):
    hidden, weight, _ = make()
    loss = list(no_labels(hidden, weight))[k]()
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def as_recipes_shift(labels):
    """What each position is to predict, as this version's recipes have it at the loss."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE) if _torchtune.RECIPES_SHIFT_LABELS else labels


def stock_step(loss_fn, logits, labels):
    """What torchtune's recipes do between model and loss; logits [b, s, v] or [n, v]."""
    return loss_fn(logits.reshape(-1, logits.size(-1)), as_recipes_shift(labels).reshape(-1))


PLAIN = torch.nn.CrossEntropyLoss(ignore_index=IGNORE)


@pytest.mark.parametrize("shifts", [True, False])
def test_stock_recipe_step_equals_plain_cross_entropy(shifts, monkeypatch):
    monkeypatch.setattr(_torchtune, "RECIPES_SHIFT_LABELS", shifts)
    hidden, weight, labels = make()
    rows = labelled_rows(labels)
    assert int(rows.sum()) == int((labels[:, 1:] if shifts else labels).ne(IGNORE).sum())
    ours = stock_step(LabelledRowsLoss(), hidden[rows] @ weight.T, labels)
    theirs = stock_step(PLAIN, hidden @ weight.T, labels)
    assert relative(ours, theirs) < 1e-6
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(theirs, (hidden, weight)),
        strict=True,
    ):
        assert relative(a, b) < 1e-6


def test_rows_of_the_unshifted_labels_are_seen_to_be_wrong():
    hidden, weight, labels = make()
    labels[:, 0], labels[:, -1] = IGNORE, 3
    rows = (
        (labels != IGNORE) if _torchtune.RECIPES_SHIFT_LABELS else labelled_rows(labels).roll(-1, 1)
    )
    ours = stock_step(LabelledRowsLoss(), hidden[rows] @ weight.T, labels)
    theirs = stock_step(PLAIN, hidden @ weight.T, labels)
    assert relative(ours, theirs) > 1e-3


def plain_way(model, batch, labels):
    return stock_step(PLAIN, model(**batch), labels)


def stock_way(model, batch, labels):
    logits = model(**batch, output_mask=labelled_rows(labels))
    return stock_step(LabelledRowsLoss(), logits, labels)


def linear_way(model, batch, labels):
    hidden = model(**batch, output="hidden")
    weight = getattr(model.output, "tied_module", model.output).weight
    return linear_cross_entropy(hidden, weight, as_recipes_shift(labels), chunk_rows=5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", [stock_way, linear_way])
def test_loss_and_every_gradient_of_the_model_equal_the_plain_way(way, tied):
    model, inputs = tiny.model(tie_word_embeddings=tied), tiny.inputs()
    labels, results = from_dataset(inputs.labels), []
    for compute in (plain_way, way):
        model.zero_grad()
        loss = compute(model, inputs.ours, labels)
        loss.backward()
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (theirs, right), (ours, gradients) = results
    assert relative(ours, theirs) < 1e-6
    for name, gradient in gradients.items():
        if not name.endswith("k_proj.bias"):  # its true gradient is 0, this is rounding
            assert float((gradient - right[name]).norm() / right[name].norm()) < 1e-6, name


def test_the_shift_is_where_this_torchtune_has_it():
    """The flag against the labels that the installed dataset makes."""
    sample = {"tokens": [4, 5, 6], "mask": [True, False, False]}
    labels = SFTTransform(model_transform=lambda _: sample)({})["labels"]
    expected = [IGNORE, 5, 6] if _torchtune.RECIPES_SHIFT_LABELS else [5, 6, IGNORE]
    assert list(labels) == expected


def test_wrong_number_of_rows_is_refused():
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match=r"120 rows and \d+ labels; .*output_mask"):
        stock_step(LabelledRowsLoss(), hidden @ weight.T, labels)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, labels = make()
    with pytest.raises(ValueError, match=r"\[3, 40, 32\], \[500, 32\] and \[3, 39\]"):
        linear_cross_entropy(hidden, weight, labels[:, 1:])
    with pytest.raises(ValueError, match="kernel must be"):
        linear_cross_entropy(hidden, weight, labels, kernel="triton")


def test_a_sharded_weight_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        hidden, weight, labels = make()
        shard = DTensor.from_local(weight, DeviceMesh("cpu", [0]), [Replicate()])
        with pytest.raises(ValueError, match="reshard_after_forward=False"):
            linear_cross_entropy(hidden, shard, labels)
    finally:
        torch.distributed.destroy_process_group()


def test_liger_is_an_extra_and_imported_only_when_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    linear_cross_entropy(*make())
    with pytest.raises(ImportError, match="liger_kernel"):
        linear_cross_entropy(*make(), kernel="liger")


@pytest.mark.gpu
def test_liger_equals_the_plain_loss():
    pytest.importorskip("liger_kernel", reason="needs the extra: torchtune-qwen25vl[cuda]")
    hidden, weight, labels = make()
    tensors = [t.detach().cuda().requires_grad_() for t in (hidden, weight)] + [labels.cuda()]
    fused = with_gradients(lambda *t: linear_cross_entropy(*t, kernel="liger"), *tensors)
    for a, b in zip(fused, with_gradients(plain, *tensors), strict=True):
        assert relative(a, b) < 1e-5
