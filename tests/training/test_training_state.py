"""Checkpoints of a run."""

import pytest
import tiny
import torch
from torchtune import modules, training
from training_samples import Transform, sample

from torchtune_qwen25vl.training import (
    MuonAdamW,
    StepCollate,
    StochasticAdamW,
    _state,
    last_checkpoint,
    load_step,
    save_step,
    set_aside,
    train_step,
)
from torchtune_qwen25vl.training._state import checkpoints

LORA = {
    "lora_attn_modules": ["q_proj", "v_proj"],
    "decoder_trainable": "lora",
    "vision_trainable": "frozen",
}
IDENTITY = {"seed": 0, "parts": {"vision": {"lr": 0.1}}}


def run(optimizer_class=torch.optim.AdamW, **options):
    """A model, its optimiser with two groups, and its schedule."""
    model = tiny.model(**options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained[::2], "lr": 1e-3}, {"params": trained[1::2], "lr": 1e-2}]
    optimizer = optimizer_class(groups)
    scheduler = training.get_cosine_schedule_with_warmup(optimizer, 2, 10)
    return model, optimizer, scheduler


def steps(state, first, last, kinds=("image", "text", "video")):
    """Losses of these steps."""
    model, optimizer, scheduler = state
    losses = []
    for number in range(first, last):
        samples = [sample(kind, number) for kind in kinds]
        batches = StepCollate(Transform.pad_id, batch_size=2, pack_to=None)(samples).batches
        losses.append(train_step(model, optimizer, batches, scheduler=scheduler).loss)
    return losses


@pytest.mark.parametrize("options", [{}, LORA, {"optimizer_class": MuonAdamW}])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_restored_equals_uninterrupted(tmp_path, options, checkpointed):
    whole = run(**options)
    first = steps(whole, 0, 3)
    path = save_step(tmp_path, 3, *whole[:2], identity=IDENTITY, keep_last=1)
    rest = steps(whole, 3, 6)

    other = run(**options)
    with torch.no_grad():  # what is trained comes from the checkpoint alone
        for parameter in other[0].parameters():
            parameter.add_(parameter.requires_grad)
    if checkpointed:  # as another run of the same model may be
        training.set_activation_checkpointing(other[0], {modules.TransformerSelfAttentionLayer})
    assert load_step(path, *other, identity=IDENTITY, total_steps=10) == 3
    assert steps(other, 3, 6) == rest
    assert len(set(first + rest)) == 6
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(other[0].state_dict()[name], weight), name


def test_the_last_ones_are_kept(tmp_path):
    state = run(**LORA)
    for step in (1, 2, 10, 9):
        steps(state, 0, 1)
        save_step(tmp_path, step, *state[:2], identity=IDENTITY, keep_last=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_9", "step_10"]
    assert last_checkpoint(tmp_path).name == "step_10"


def test_frozen_weights_are_not_written(tmp_path):
    state = run(**LORA)
    steps(state, 0, 1)
    sizes = []
    for folder, each in (("lora", state), ("full", run())):
        steps(each, 0, 1)
        path = save_step(tmp_path / folder, 1, *each[:2], identity=IDENTITY, keep_last=1)
        sizes.append(sum(file.stat().st_size for file in path.iterdir()))
    assert sizes[0] < sizes[1] / 3


def test_a_checkpoint_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    state = run(**LORA)
    steps(state, 0, 1)
    save_step(tmp_path, 1, *state[:2], identity=IDENTITY, keep_last=2)

    def stop(state, checkpoint_id):
        (checkpoint_id / "half").write_text("")
        raise OSError("no space left")

    monkeypatch.setattr(_state.dcp, "save", stop)
    with pytest.raises(OSError, match="no space left"):
        save_step(tmp_path, 2, *state[:2], identity=IDENTITY, keep_last=2)
    assert last_checkpoint(tmp_path).name == "step_1"
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_a_run_with_other_options_is_refused(tmp_path):
    state = run(**LORA)
    steps(state, 0, 1)
    path = save_step(tmp_path, 1, *state[:2], identity=IDENTITY, keep_last=2)
    other = {**IDENTITY, "seed": 1}
    with pytest.raises(ValueError, match=r"differs in \(then, now\) \{'seed': \(0, 1\)\}"):
        load_step(path, *state, identity=other, total_steps=10)


def test_a_run_that_ends_before_its_checkpoint_is_refused(tmp_path):
    state = run(**LORA)
    steps(state, 0, 1)
    path = save_step(tmp_path, 3, *state[:2], identity=IDENTITY, keep_last=2)
    assert load_step(path, *state, identity=IDENTITY, total_steps=3) == 3
    with pytest.raises(ValueError, match="step_3 is beyond the 2 steps of this one; raise max_st"):
        load_step(path, *state, identity=IDENTITY, total_steps=2)


def test_checkpoints_set_aside_are_kept_but_not_found(tmp_path):
    set_aside(tmp_path / "nothing yet")
    for steps_before in ((2, 4), (4,)):
        for step in steps_before:
            (tmp_path / f"step_{step}").mkdir()
            (tmp_path / f"step_{step}" / "of").write_text(f"{steps_before}")
        set_aside(tmp_path)
        assert last_checkpoint(tmp_path) is None
    kept = {path.parent.name: path.read_text() for path in tmp_path.glob("*/of")}
    assert kept == {
        "earlier-1-step_2": "(2, 4)",
        "earlier-1-step_4": "(2, 4)",
        "earlier-2-step_4": "(4,)",
    }


def test_no_checkpoint_is_none(tmp_path):
    assert last_checkpoint(tmp_path / "nothing yet") is None


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MuonAdamW, StochasticAdamW])
def test_a_run_that_has_seen_no_image_yet_goes_on(tmp_path, optimizer):
    """The encoder has no moments then, and begins with its first image as it would have."""
    whole = run(optimizer)
    steps(whole, 0, 2, ["text", "short"])
    path = save_step(tmp_path, 2, *whole[:2], identity=IDENTITY, keep_last=1)
    rest = steps(whole, 2, 5)
    other = run(optimizer)
    load_step(path, *other, identity=IDENTITY, total_steps=10)
    assert steps(other, 2, 5) == rest
