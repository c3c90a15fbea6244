"""One step of training."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torchtune import modules, training
from training_samples import Transform, sample

from parity.faults import FAULTS
from torchtune_qwen25vl import _torchtune
from torchtune_qwen25vl.model._embedding import TiedEmbedding
from torchtune_qwen25vl.training import StepCollate, mean_loss, summed_loss, train_step

KINDS = ["text", "image", "video", "two images", "short"]
LORA = {
    "lora_attn_modules": ["q_proj", "v_proj"],
    "lora_rank": 4,
    "decoder_trainable": "lora",
    "vision_trainable": "lora",
    "merger_trainable": "frozen",
}


def batches(batch_size, kinds=KINDS):
    return StepCollate(Transform.pad_id, batch_size=batch_size, pack_to=None)(
        [sample(kind, seed) for seed, kind in enumerate(kinds)]
    ).batches


def sgd(model, lr=0.0):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def gradients_of(model, these, **options):
    seen = {}

    def look(model, *, has_media):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                name = name.replace("_checkpoint_wrapped_module.", "")
                seen[name] = parameter.grad.clone()

    return train_step(model, sgd(model), these, check=look, **options), seen


def plain_loss(model, batch):
    """All logits, mean over labels: what a plain loop computes."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "label_rows")}
    logits, labels = model(**inputs), batch["labels"]
    if _torchtune.RECIPES_SHIFT_LABELS:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@pytest.mark.parametrize("tied", [False, True])
def test_equals_the_plain_loss_in_value_and_every_gradient(tied):
    model = tiny.model(tie_word_embeddings=tied).train()
    ours, our_gradients = gradients_of(model, batches(5))
    plain, gradients = gradients_of(model, batches(5), loss=plain_loss)
    assert abs(ours.loss - plain.loss) <= 1e-6 * plain.loss
    for name, gradient in gradients.items():
        assert (our_gradients[name] - gradient).abs().max() <= 1e-6, name
    with FAULTS["labels shifted twice"].seed():
        _, wrong = gradients_of(model, batches(5))
    assert max((wrong[name] - gradients[name]).abs().max() for name in gradients) > 1e-3


def without_option(forward):
    return lambda self, tokens, add_to_grad: forward(self, tokens)


# to the last bit; three numbers are added in another order where batches accumulate
@pytest.mark.parametrize(("batch_size", "tolerance"), [(5, 0.0), (2, 1e-6)])
def test_a_tied_weight_has_the_gradient_of_autograd(batch_size, tolerance, monkeypatch):
    model = tiny.model(tie_word_embeddings=True).train()
    weight, made = model.tok_embeddings.weight, []
    handle = weight.register_hook(lambda gradient: made.append(gradient.shape))
    _, gradients = gradients_of(model, batches(batch_size))
    handle.remove()
    assert made == [weight.shape] * len(batches(batch_size))
    monkeypatch.setattr(TiedEmbedding, "forward", without_option(torch.nn.Embedding.forward))
    _, expected = gradients_of(model, batches(batch_size))
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= tolerance, name
    cut = without_option(lambda self, tokens: self.weight.detach()[tokens])
    monkeypatch.setattr(TiedEmbedding, "forward", cut)
    _, wrong = gradients_of(model, batches(batch_size))
    name = "tok_embeddings.weight"
    assert (wrong[name] - expected[name]).abs().max() > 1e-3


def test_chunks_of_rows_change_nothing():
    model = tiny.model()
    (batch,) = batches(5)
    with torch.no_grad():
        whole, chunked = (float(summed_loss(model, batch, chunk_rows=rows)) for rows in (1024, 3))
    assert abs(chunked - whole) <= 1e-6 * whole


def test_a_step_without_media_leaves_the_encoder_alone():
    """Neither decay nor the momentum of earlier steps moves what has no gradient."""
    model = tiny.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5)
    for kinds, moves in ((KINDS, True), (["text", "short"], False), (["text", "image"], True)):
        before = {name: p.clone() for name, p in model.vision.named_parameters()}
        train_step(model, optimizer, batches(1, kinds))
        for name, parameter in model.vision.named_parameters():
            assert torch.equal(parameter, before[name]) != moves, name


def test_every_label_weighs_the_same_however_batches_are_cut():
    model = tiny.model().train()
    whole, gradients = gradients_of(model, batches(5))
    cut, cut_gradients = gradients_of(model, batches(2))
    assert whole.labels == cut.labels
    assert abs(cut.loss - whole.loss) <= 1e-6 * whole.loss
    assert abs(cut.grad_norm - whole.grad_norm) <= 1e-5 * whole.grad_norm
    for name, gradient in gradients.items():
        assert (cut_gradients[name] - gradient).abs().max() <= 1e-6, name


@pytest.mark.parametrize("batch_size", [5, 2, 1])
def test_gradients_are_clipped_after_their_norm_is_taken(batch_size):
    """Once, those of all batches together: clipped one by one they would point elsewhere."""
    model = tiny.model().train()
    whole, gradients = gradients_of(model, batches(5))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    result = train_step(model, sgd(model, lr=1.0), batches(batch_size), max_grad_norm=1e-2)
    assert abs(result.grad_norm - whole.grad_norm) <= 1e-5 * whole.grad_norm
    assert whole.grad_norm > 0.1
    for name, weight in model.named_parameters():
        moved = before[name] - weight
        expected = 1e-2 / whole.grad_norm * gradients[name]
        assert (moved - expected).abs().max() <= 2e-7, name  # rounding of weights of unit size
    moved = sum((w - before[n]).square().sum() for n, w in model.named_parameters()).sqrt()
    assert abs(moved - 1e-2) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were():
    model = tiny.model().train()
    (batch,) = batches(5)
    batch["encoder_input"]["vision"]["pixel_values"][0, 0] = torch.inf
    before = model.output.weight.clone()
    with pytest.raises(ValueError, match=r"must be finite, but the loss is nan.*not taken"):
        train_step(model, sgd(model, lr=1.0), [batch])
    assert torch.equal(model.output.weight, before)


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were():
    """The loss says nothing of it: an overflow may be in the backward alone."""
    model = tiny.model().train()
    model.norm.scale.register_hook(lambda gradient: gradient * torch.inf)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=r"the loss is \d+.* norm (nan|inf); the step was not"):
        train_step(model, sgd(model, lr=1.0), batches(5))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_the_schedule_moves_on_once_a_step_and_after_it():
    model = tiny.model().train()
    optimizer = sgd(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1e-3 * step)
    before = model.output.weight.clone()
    for step, batch_size in enumerate((5, 2)):  # one batch, then three
        assert optimizer.param_groups[0]["lr"] == 1e-3 * step
        train_step(model, optimizer, batches(batch_size), scheduler=scheduler)
        assert torch.equal(model.output.weight, before) == (step == 0)  # at a rate of 0
    assert optimizer.param_groups[0]["lr"] == 2e-3


def test_the_check_sees_gradients_as_they_are_and_may_stop_the_step():
    model = tiny.model().train()
    _, expected = gradients_of(model, batches(2))
    _, seen = gradients_of(model, batches(2), max_grad_norm=1e-3)
    for name, gradient in expected.items():
        assert (seen[name] - gradient).abs().max() <= 1e-6, name

    def refuse(model, *, has_media):
        raise ValueError("no")

    before = model.output.weight.clone()
    with pytest.raises(ValueError, match="no"):
        train_step(model, sgd(model, lr=1.0), batches(5), check=refuse)
    assert torch.equal(model.output.weight, before)


def test_a_step_without_labels_moves_nothing():
    model = tiny.model().train()
    (batch,) = batches(5)
    batch["labels"].fill_(-100)
    batch["label_rows"] = batch["label_rows"][:0]
    before = model.output.weight.clone()
    result = train_step(model, sgd(model, lr=1.0), [batch])
    assert (result.loss, result.labels, result.grad_norm) == (0.0, 0, 0.0)
    assert torch.equal(model.output.weight, before)


def test_a_frozen_encoder_runs_without_a_graph():
    model = tiny.model(vision_trainable="frozen").train()
    seen = []
    for layer in model.vision.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output.grad_fn))
    model.vision.register_forward_hook(lambda module, args, output: seen.append(output.grad_fn))
    summed_loss(model, batches(5)[0]).backward()
    assert seen[:-1] == [None, None]
    assert seen[-1] is not None  # the merger is trained


def test_checkpointed_layers_keep_the_gradients_of_adapters_in_the_encoder():
    plain, checkpointed = tiny.model(**LORA).train(), tiny.model(**LORA).train()
    training.set_activation_checkpointing(checkpointed, {modules.TransformerSelfAttentionLayer})
    wrapped = [n for n, _ in checkpointed.named_modules() if n.endswith("_wrapped_module")]
    assert sum(name.startswith("vision.layers") for name in wrapped) == 2
    (_, expected), (_, found) = (gradients_of(m, batches(5)) for m in (plain, checkpointed))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert gradient.any(), name
        assert torch.equal(found[name], gradient), name


def test_mean_loss_is_that_of_all_labels_without_dropout():
    model = tiny.model(**LORA, lora_dropout=0.5).train()
    cpu = torch.device("cpu")
    losses = [mean_loss(model, batches(size), device=cpu) for size in (5, 2, 5)]
    assert losses[0] == losses[2]
    assert abs(losses[1] - losses[0]) <= 1e-6 * losses[0]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
