"""The recipe preference, run as a user runs it."""

import json
from pathlib import Path

import own_runs
import pytest
import torch
from finetune_runs import logged, losses
from omegaconf import OmegaConf
from preference_runs import RECIPE, config, recipe, run
from safetensors.torch import load_file

from parity import reference
from torchtune_qwen25vl.training import (
    PreferenceSettings,
    _preference_settings,
    _stepping,
    read_settings,
)

CONSTANT = {"_component_": "training_on_ranks.constant"}
UNPAIRED = {
    "loss": {"name": "kto", "beta": 0.3},
    "dataset": {"_component_": "preference_samples.Pairs", "paired": False},
    "val_dataset": {"_component_": "preference_samples.Pairs", "paired": False, "size": 6},
    "pack_to": None,
}
FULL = {
    "parts": {name: {"train": "full", "lr": 1e-4} for name in ("vision", "merger", "decoder")},
    "adapters": None,
    "precompute_reference": True,
}
FROZEN = {"vision": {"train": "frozen"}, "merger": {"train": "frozen"}}
ADAPTED = {
    "vision": {"train": "lora", "lr": 1e-2},
    "merger": {"train": "frozen"},
    "decoder": {"train": "lora", "lr": 1e-2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as transformers saves it."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    reference.random_model("tiny").save_pretrained(path)
    return path


def simple(folder, output_dir, **changes):
    """A YAML without validation, dropout and checkpoints, of 4 steps at one rate."""
    every = {"eval_every_n_steps": None, "save_every_n_steps": None}
    quiet = {"val_dataset": None, "lr_scheduler": CONSTANT, "max_steps": 4, **every}
    cfg = config(folder, output_dir, **{**quiet, **changes})
    if cfg.adapters is not None:
        cfg.adapters.lora_dropout = 0.0
    return cfg


def assert_near(one, other, rel):
    """Two runs logged the same, but for rounding."""
    one, other = logged(one), logged(other)
    assert one.keys() == other.keys()
    for step, figures in one.items():
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/rejected", "rows"):
            assert other[step][name] == pytest.approx(figures[name], rel=rel, abs=1e-5), (
                step,
                name,
            )


# what the YAML says


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "dpo"}, "loss is a section of keys, got loss='dpo'"),
        ({"loss.name": "sigmoid"}, "loss.name is one of"),
        ({"loss.gamma": 1.0}, r"loss dpo has no keys \['gamma'\]"),
        ({"beta": 0.1}, r"unknown keys \['beta'\]"),
        ({"reference_dir": 3}, "reference_dir is a text, or null, got reference_dir=3"),
        ({"precompute_reference": "yes"}, "precompute_reference is True or False, got"),
        (
            {"loss": {"name": "simpo"}, "precompute_reference": True},
            "the loss simpo knows no reference; leave .* got reference_dir=None, precompute_re",
        ),
        ({"loss": {"name": "orpo"}, "reference_dir": "a"}, "the loss orpo knows no reference"),
        (
            {"parts.merger": {"train": "full", "lr": 1e-4}},
            "but merger is trained in full; set precompute_reference True, or reference_dir to",
        ),
        ({"loss": {"name": "kto"}}, "kto moves answers .* got batch_size=2, pack_to=160, precom"),
        ({"loss": {"name": "kto"}, "pack_to": None, "batch_size": 1}, "a batch_size from 2"),
        (
            {"loss": {"name": "kto"}, "pack_to": None, "precompute_reference": True},
            "precompute_reference False",
        ),
        ({"pack_to": 159}, r"at least twice tokenizer.max_seq_len \(80\); .* got pack_to=159"),
        ({"tokenizer.max_seq_len": None}, r"at least twice tokenizer.max_seq_len \(None\)"),
        ({"loss_kernel": "liger"}, "'liger' "),
        ({"max_steps": 0}, "max_steps is a whole number"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_loaded(folder, tmp_path, changes, said):
    cfg = config(folder, tmp_path)
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ValueError, match=said):
        recipe().PreferenceRecipe(cfg)


def test_every_setting_has_a_kind_and_is_used():
    assert set(_preference_settings.PREFERENCE) == own_runs.own_settings(PreferenceSettings)
    assert own_runs.unread("preference", PreferenceSettings) == {"loss_kernel"}  # refused


def test_the_config_is_complete():
    settings = read_settings(
        OmegaConf.load(RECIPE.parent / "configs" / "preference.yaml"), PreferenceSettings
    )
    assert settings.paired
    assert settings.has_reference


# what it does


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "simpo", "orpo", "mpo", "kto"])
def test_every_loss_learns_what_it_is_told(folder, tmp_path, name):
    cfg = simple(folder, tmp_path, max_steps=8, **(UNPAIRED if name == "kto" else {}))
    cfg.loss = {"name": name, "beta": 0.3}
    cfg.val_dataset = None
    cfg.dataset.size = 4
    cfg.shuffle = False
    run(cfg)
    first, last = logged(tmp_path)[1], logged(tmp_path)[8]
    assert last["loss"] < first["loss"]
    assert last["rewards/margins"] > first["rewards/margins"]
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], rel=1e-6
    )
    assert reference.load(str(tmp_path / "model"), torch.float32) is not None


def test_the_first_step_of_dpo_is_log_2_and_its_rewards_are_0(folder, tmp_path):
    run(simple(folder, tmp_path, max_steps=1))
    (figures,) = logged(tmp_path).values()
    assert figures["loss"] == pytest.approx(0.6931471805599453, rel=1e-6)
    assert figures["grad_norm"] > 1e-2
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert figures[f"rewards/{name}"] == 0
    assert figures["logps/chosen"] < -1
    assert figures["rows"] == 4


@pytest.mark.parametrize("parts", [None, ADAPTED], ids=["media frozen", "vision trained"])
def test_packed_or_padded_is_the_same_run(folder, tmp_path, parts):
    changes = {} if parts is None else {"parts": parts}
    run(simple(folder, tmp_path / "packed", **changes))
    run(simple(folder, tmp_path / "padded", pack_to=None, **changes))
    assert_near(tmp_path / "packed", tmp_path / "padded", rel=1e-5)


@pytest.mark.parametrize("parts", [None, ADAPTED], ids=["media frozen", "vision trained"])
@pytest.mark.parametrize("way", ["kept", "a folder"])
def test_every_reference_is_the_same_model(folder, tmp_path, parts, way):
    changes = {} if parts is None else {"parts": parts}
    run(simple(folder, tmp_path / "adapters off", **changes))
    how = {"kept": {"precompute_reference": True}, "a folder": {"reference_dir": str(folder)}}
    run(simple(folder, tmp_path / way, **how[way], **changes))
    assert_near(tmp_path / "adapters off", tmp_path / way, rel=2e-5)


def test_another_reference_is_another_loss(folder, tmp_path):
    reference.random_model("tiny", seed=1).save_pretrained(tmp_path / "other")
    run(simple(folder, tmp_path, max_steps=1, reference_dir=str(tmp_path / "other")))
    assert abs(logged(tmp_path)[1]["loss"] - 0.693) > 1e-2


def test_trained_in_full_against_what_the_model_was(folder, tmp_path):
    cfg = simple(folder, tmp_path / "kept", **FULL)
    cfg.val_dataset, cfg.eval_every_n_steps = {**cfg.dataset, "size": 5}, 2
    made = run(cfg)
    assert made.objective.media.reference is None
    kept = logged(tmp_path / "kept")
    assert kept[1]["loss"] == pytest.approx(0.6931472, rel=1e-6)
    assert kept[4]["val_loss"] < 0.69
    del cfg.precompute_reference
    cfg.reference_dir, cfg.output_dir = str(folder), str(tmp_path / "folder")
    run(cfg)
    assert_near(tmp_path / "kept", tmp_path / "folder", rel=2e-5)
    assert logged(tmp_path / "folder")[4]["val_loss"] == pytest.approx(
        kept[4]["val_loss"], rel=1e-5
    )


def test_what_is_kept_goes_on_where_it_was_killed_and_belongs_to_its_rows(folder, tmp_path):
    cfg = simple(folder, tmp_path, precompute_reference=True, max_steps=1)
    run(cfg)
    path = tmp_path / "reference-dataset.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 24 / 4
    path.write_bytes(b"".join(lines[:4]) + lines[4][:9])  # as a killed run leaves it
    made = recipe().PreferenceRecipe(cfg)
    made.setup()
    assert path.read_bytes() == whole
    assert made.dataset[5]["reference"].tolist() == json.loads(lines[2])["5"]
    assert "chosen" not in lines[0].decode()
    cfg.dataset.size = 23
    with pytest.raises(ValueError, match=r"-dataset.jsonl differ in \(then, now\) .*remove"):
        recipe().PreferenceRecipe(OmegaConf.merge(cfg, {"resume": False})).setup()


def test_goes_on_as_if_it_had_never_stopped(folder, tmp_path, monkeypatch):
    """Bit for bit, with dropout, and with other workers."""
    cfg = config(folder, tmp_path / "whole", precompute_reference=True)
    run(cfg)
    expected = logged(cfg.output_dir)
    other = config(folder, tmp_path / "cut", precompute_reference=True)
    real, taken = _stepping.train_step, []

    def stops(*args, **kwargs):
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(_stepping, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        run(other)
    monkeypatch.undo()
    other.dataloader = {"num_workers": 2}
    run(other)
    for step, figures in logged(other.output_dir).items():
        for name in ("loss", "grad_norm", "rewards/margins", "logps/rejected"):
            assert figures[name] == expected[step][name], (step, name)
    weights = [load_file(Path(c.output_dir) / "model" / "model.safetensors") for c in (cfg, other)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def test_goes_on_after_sigkill(folder, tmp_path):
    killed = config(folder, tmp_path / "killed", lr_scheduler=CONSTANT, max_steps=10**6)
    own_runs.kill_behind("preference", killed, "step_4")
    last = recipe().ours.last_checkpoint(tmp_path / "killed")
    killed.max_steps = int(last.name.removeprefix("step_")) + 3
    run(killed)
    whole = config(folder, tmp_path / "whole", lr_scheduler=CONSTANT, max_steps=killed.max_steps)
    run(whole)
    assert losses(killed.output_dir) == losses(whole.output_dir)


def test_what_a_run_depends_on_may_not_change(folder, tmp_path):
    cfg = simple(folder, tmp_path / "out", max_steps=1, save_every_n_steps=1)
    run(cfg)
    reference.random_model("tiny", seed=1).save_pretrained(tmp_path / "other")
    changes = {
        "loss": {"loss.beta": 0.3},
        "precompute_reference": {"precompute_reference": True},
        "reference": {"reference_dir": str(tmp_path / "other")},
    }
    for name, change in changes.items():
        other = cfg.copy()
        for key, value in change.items():
            OmegaConf.update(other, key, value, force_add=True)
        with pytest.raises(ValueError, match=rf"\(then, now\) \{{'{name}': \("):
            recipe().PreferenceRecipe(other).setup()
    against = simple(
        folder, tmp_path / "2", max_steps=1, save_every_n_steps=1, reference_dir=str(folder)
    )
    run(against)
    against.reference_dir = None
    with pytest.raises(ValueError, match=r"\(then, now\) \{'reference': \("):
        recipe().PreferenceRecipe(against).setup()


def test_validation_changes_nothing(folder, tmp_path):
    cfg = config(folder, tmp_path / "with")
    cfg.log_every_n_steps = 2
    run(cfg)
    without = config(folder, tmp_path / "without", val_dataset=None, eval_every_n_steps=None)
    without.log_every_n_steps = 2
    run(without)
    found, expected = logged(tmp_path / "with"), logged(tmp_path / "without")
    for step in (2, 4, 6):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert found[step][name] == expected[step][name]
    assert "val_rewards/accuracies" in found[3]


@pytest.mark.parametrize("kept", [False, True], ids=["adapters off", "kept"])
def test_every_image_is_encoded_once_a_step(folder, tmp_path, kept, monkeypatch):
    """Whatever is held against what: as many patches as the distinct images of a step have."""
    cfg = simple(folder, tmp_path, max_steps=1, precompute_reference=kept)
    made = recipe().PreferenceRecipe(cfg)
    made.setup()
    patches = []
    made.model.vision.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    expected = []
    take = made.ready

    def counts(data):
        expected.extend(t * h * w for grids in data.grids for t, h, w in grids)
        return take(data)

    monkeypatch.setattr(made, "ready", counts)
    made.train()
    assert sum(patches) == sum(expected) > 0


def test_export_writes_a_step(folder, tmp_path):
    cfg = simple(folder, tmp_path, save_every_n_steps=2)
    run(cfg)
    made = recipe().PreferenceRecipe(cfg)
    before = load_file(tmp_path / "model" / "model.safetensors")
    made.export("step_2")
    after = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


# on two ranks

RANKS = {
    "dpo, packed": {},
    "dpo, vision trained": {"parts": ADAPTED},
    "kept, in full": FULL,
    "decoder in full": {**FULL, "parts": {**FROZEN, "decoder": {"train": "full", "lr": 1e-4}}},
    "kto": {**UNPAIRED, "val_dataset": None},
    "a folder": {"reference_dir": "FOLDER"},
}


@pytest.fixture(scope="module")
def two_ranks(folder, tmp_path_factory):
    """The config of a run of each kind, by two processes."""
    shared = tmp_path_factory.mktemp("ranks")
    cfgs = {}
    for title, changes in RANKS.items():
        given = {k: str(folder) if v == "FOLDER" else v for k, v in changes.items()}
        cfgs[title] = simple(folder, shared / title, gradient_accumulation_steps=1, **given)
    own_runs.run_on_two("preference", cfgs.values())
    return cfgs


@pytest.mark.parametrize("title", RANKS)
def test_two_ranks_equal_one(two_ranks, tmp_path, title):
    cfg, two_dir = two_ranks[title].copy(), Path(two_ranks[title].output_dir)
    cfg.gradient_accumulation_steps, cfg.output_dir = 2, str(tmp_path)
    run(cfg)
    assert_near(tmp_path, two_dir, rel=2e-5)
    one, two = (load_file(p / "model" / "model.safetensors") for p in (tmp_path, two_dir))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-4)
