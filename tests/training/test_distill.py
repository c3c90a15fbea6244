"""The recipe distill, run as a user runs it."""

import json
from functools import partial

import own_runs
import pytest
import tiny_folder
import torch
from finetune_runs import logged
from omegaconf import OmegaConf

from parity import reference
from torchtune_qwen25vl.training import (
    DistillSettings,
    _distill_settings,
    read_settings,
)

CONFIG = own_runs.ROOT / "recipes" / "configs" / "distill.yaml"
CONSTANT = {"_component_": "training_on_ranks.constant"}
SMALL = {
    "device": "cpu",
    "precision": "fp32",
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "epochs": None,
    "max_steps": 3,
    "pack_to": 256,
    "loss_chunk_rows": 20,
    "tokenizer.max_seq_len": 256,
    "dataloader.num_workers": 0,
    "enable_activation_checkpointing": False,
    "warmup_ratio": None,
    "save_every_n_steps": None,
    "metric_logger.log_dir": "${output_dir}",
    "metric_logger.filename": "log.txt",
    "parts.merger.lr": 1e-3,
    "parts.decoder.lr": 1e-3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A student, a wider teacher with another vocabulary, and rows."""
    folder = tmp_path_factory.mktemp("distill")
    tiny_folder.write_folder(folder / "student", tied=True)
    tiny_folder.write_folder(folder / "teacher", tied=False, width=64, vocab_size=152064)
    tiny_folder.write_pictures(folder / "rows")
    return folder


def config(base, output_dir, **changes):
    """The shipped config on tiny models, four steps at one rate."""
    cfg = OmegaConf.load(CONFIG)
    own = {
        "model_dir": str(base / "student"),
        "teacher_dir": str(base / "teacher"),
        "output_dir": str(output_dir),
        "dataset.source": str(base / "rows" / "rows.json"),
        "optimizer._component_": "torch.optim.AdamW",
    }
    for key, value in {**SMALL, **own, **changes}.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    cfg.lr_scheduler = CONSTANT
    return cfg


def run(cfg):
    return own_runs.run("distill", cfg)


# what the YAML says


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "kl"}, "loss is a section of keys, got loss='kl'"),
        ({"loss.name": "kl"}, "loss.name is one of forward_kl, reverse_kl, jsd"),
        ({"loss.gamma": 1.0}, r"loss has no keys \['gamma'\]"),
        ({"loss.beta": 0.3}, "loss.beta is for jsd alone; leave it out"),
        ({"loss.temperature": 0}, "loss.temperature is a number of more than 0"),
        ({"loss.kd_ratio": 1.5}, "loss.kd_ratio is a number of more than 0 and at most 1"),
        ({"loss.kd_ratio": True}, "loss.kd_ratio is a number"),
        ({"teacher_dir": None}, "teacher_dir is a text, got teacher_dir=None"),
        ({"teacher": "a"}, r"unknown keys \['teacher'\]"),
        ({"loss_kernel": "liger"}, "'liger' "),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_loaded(base, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        own_runs.make("distill", config(base, tmp_path, **changes))


def test_every_setting_has_a_kind_and_is_used():
    assert set(_distill_settings.DISTILL) == own_runs.own_settings(DistillSettings)
    assert own_runs.unread("distill", DistillSettings) == {"loss_kernel"}  # refused


def test_the_config_is_complete():
    assert read_settings(OmegaConf.load(CONFIG), DistillSettings).loss.kd_ratio == 0.5


def test_a_teacher_of_other_tokens_is_refused(base, tmp_path):
    other = tiny_folder.write_folder(tmp_path / "other", tied=True)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids["!"], ids["?"] = ids["?"], ids["!"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"2 tokens have other ids \(student, teacher\): {'!': \("):
        own_runs.make("distill", config(base, tmp_path / "out", teacher_dir=str(other))).setup()


def test_a_teacher_of_other_pixels_is_refused(base, tmp_path):
    other = tiny_folder.write_folder(tmp_path / "other", tied=True)
    path = other / "preprocessor_config.json"
    path.write_text(path.read_text()[:-1] + ', "image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match=r"see the same pixels, .*0\.5, 0\.5, 0\.5"):
        own_runs.make("distill", config(base, tmp_path / "out", teacher_dir=str(other))).setup()


# what it does


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "forward_kl", "temperature": 2.0},
        {"name": "reverse_kl", "kd_ratio": 1.0},
        {"name": "jsd", "beta": 0.3, "kd_ratio": 0.7},
    ],
    ids=lambda loss: loss["name"],
)
def test_every_divergence_shrinks(base, tmp_path, loss):
    fast = {"parts.decoder.lr": 1e-2, "parts.merger.lr": 1e-2}
    cfg = config(base, tmp_path, max_steps=6, shuffle=False, **fast)
    cfg.loss = loss
    cfg.val_dataset, cfg.eval_every_n_steps = cfg.dataset, 6
    run(cfg)
    first, last = logged(tmp_path)[1], logged(tmp_path)[6]
    assert last["kd_loss"] < 0.9 * first["kd_loss"]
    ratio = loss.get("kd_ratio", 0.5)
    for prefix in ("", "val_"):
        plain = last.get(f"{prefix}class_loss", 0.0)
        mixed = ratio * last[f"{prefix}kd_loss"] + (1 - ratio) * plain
        assert last[f"{prefix}loss"] == pytest.approx(mixed, rel=1e-5)
    assert ("class_loss" in last) == (ratio < 1)
    assert reference.load(str(tmp_path / "model"), torch.float32) is not None


def test_a_model_has_nothing_to_learn_from_itself(base, tmp_path):
    cfg = config(base, tmp_path, teacher_dir=str(base / "student"), max_steps=1)
    run(cfg)
    figures = logged(tmp_path)[1]
    assert abs(figures["kd_loss"]) < 1e-6
    assert figures["loss"] == pytest.approx(figures["class_loss"] / 2, rel=1e-6)
    against_another = config(base, tmp_path / "control", max_steps=1)
    run(against_another)
    assert logged(tmp_path / "control")[1]["kd_loss"] > 0.1


def test_packed_or_padded_is_the_same_run(base, tmp_path):
    run(config(base, tmp_path / "packed"))
    run(config(base, tmp_path / "padded", pack_to=None, loss_chunk_rows=1024))
    assert_near(tmp_path / "packed", tmp_path / "padded", rel=2e-5)


def assert_near(one, other, rel):
    one, other = logged(one), logged(other)
    assert one.keys() == other.keys()
    for step, figures in one.items():
        for name in ("loss", "kd_loss", "class_loss", "grad_norm", "labels"):
            assert other[step][name] == pytest.approx(figures[name], rel=rel), (step, name)


def test_goes_on_after_sigkill_bit_for_bit(base, tmp_path):
    made = partial(config, base)
    own_runs.assert_goes_on_after_sigkill("distill", made, tmp_path, ["loss"])


def test_what_a_run_depends_on_may_not_change(base, tmp_path):
    cfg = config(base, tmp_path, max_steps=1, save_every_n_steps=1)
    run(cfg)
    for name, change in {
        "loss": {"loss.temperature": 2.0},
        "teacher": {"teacher_dir": str(base / "student")},
    }.items():
        other = cfg.copy()
        for key, value in change.items():
            OmegaConf.update(other, key, value)
        with pytest.raises(ValueError, match=rf"\(then, now\) \{{'{name}': \("):
            own_runs.make("distill", other).setup()


def test_two_ranks_equal_one(base, tmp_path):
    two = config(base, tmp_path / "two", gradient_accumulation_steps=1)
    own_runs.run_on_two("distill", [two])
    run(config(base, tmp_path / "one"))
    assert_near(tmp_path / "one", tmp_path / "two", rel=2e-5)
