"""The recipe policy, run as a user runs it."""

import json
import shutil
from functools import partial
from itertools import chain

import own_runs
import pytest
import torch
from finetune_runs import logged
from omegaconf import OmegaConf
from tiny_folder import write_pairs, write_pictures

from torchtune_qwen25vl import qwen2_5_vl_from_config, tune_to_hf
from torchtune_qwen25vl.shapes import tiny_folder
from torchtune_qwen25vl.training import (
    PolicySettings,
    _policy_settings,
    read_settings,
)
from torchtune_qwen25vl.weights import write_weights

CONFIG = own_runs.ROOT / "recipes" / "configs" / "policy.yaml"
CONSTANT = {"_component_": "training_on_ranks.constant"}
REWARDS = [
    {"_component_": "torchtune_qwen25vl.training.pattern", "regex": "[a-e]"},
    {"_component_": "torchtune_qwen25vl.training.length", "most": 1, "weight": 0.25},
]
SMALL = {
    "device": "cpu",
    "precision": "fp32",
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "group_size": 3,
    "max_new_tokens": 4,
    "temperature": 1.3,
    "epochs": None,
    "max_steps": 3,
    "pack_to": 512,
    "loss_chunk_rows": 7,
    "tokenizer.max_seq_len": 256,
    "dataloader.num_workers": 0,
    "enable_activation_checkpointing": False,
    "warmup_ratio": None,
    "save_every_n_steps": None,
    "metric_logger.log_dir": "${output_dir}",
    "metric_logger.filename": "log.txt",
    "dataset._component_": "torchtune_qwen25vl.data.llava_dataset",
    "optimizer._component_": "torch.optim.AdamW",
    "parts.decoder.lr": 1e-3,
}
FULL = {"vision": {"train": "frozen"}, "merger": {"train": "full", "lr": 1e-3}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that writes letters, and rows."""
    folder = tmp_path_factory.mktemp("policy")
    model = qwen2_5_vl_from_config(tiny_folder())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=weight.shape[1] ** -0.5)
    shutil.copytree(tiny_folder(), folder / "model")
    weights = tune_to_hf(model.state_dict())
    write_weights(folder / "model", weights, dict.fromkeys(weights, "model.safetensors"))
    write_pictures(folder / "rows")
    write_pictures(folder / "few", rows=5)
    return folder


def config(base, output_dir, **changes):
    """The shipped config on a tiny model, three steps at one rate."""
    cfg = OmegaConf.load(CONFIG)
    own = {
        "model_dir": str(base / "model"),
        "output_dir": str(output_dir),
        "dataset.source": str(base / "rows" / "rows.json"),
    }
    for key, value in {**SMALL, **own, **changes}.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    if "rewards" not in changes:
        cfg.rewards = OmegaConf.create([{"_component_": "policy_rewards.odd_letters"}])
    cfg.lr_scheduler = CONSTANT
    return cfg


def run(cfg):
    return own_runs.run("policy", cfg)


# what the YAML says


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss.name": "ppo"}, "loss.name is one of"),
        ({"group_size": 1}, "a group has 2 or more"),
        ({"rewards": []}, "rewards is a list of sections"),
        ({"rewards": ["a"]}, "rewards are components with a weight, got 'a'"),
        (
            {"rewards": [{"_component_": "torchtune_qwen25vl.training.none"}]},
            r"rewards\.0 must name",
        ),
        (
            {"rewards": [{"_component_": "torchtune_qwen25vl.training.length", "mots": 3}]},
            r"rewards\.0 must suit .*mots",
        ),
        ({"reference_dir": "a"}, "with loss.beta 0 there is no reference"),
        ({"loss.beta": 0.1, "parts.merger": FULL["merger"]}, "merger is trained in full; set ref"),
        ({"pack_to": 267}, r"group_size \* max_new_tokens \(268\)"),
        ({"rows_in_flight": 2}, "rows_in_flight is at least group_size"),
        ({"adapters.lora_dropout": 0.1}, "drawn without dropout"),
        ({"temperature": 0}, "temperature is a number of more than 0"),
        ({"num_generations": 8}, r"unknown keys \['num_generations'\]"),
        ({"loss_kernel": "liger"}, "'liger' "),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_loaded(base, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        own_runs.make("policy", config(base, tmp_path, **changes))


def test_every_setting_has_a_kind_and_is_used():
    assert set(_policy_settings.POLICY) == own_runs.own_settings(PolicySettings)
    assert own_runs.unread("policy", PolicySettings) == {"loss_kernel"}  # refused


def test_the_config_is_complete():
    assert read_settings(OmegaConf.load(CONFIG), PolicySettings).group_size == 8


def test_a_data_set_of_others_has_no_prompts(base, tmp_path):
    cfg = config(base, tmp_path)
    cfg.dataset = {"_component_": "training_samples.Samples"}
    with pytest.raises(ValueError, match="the prompts of rows, which Samples does not tell"):
        own_runs.make("policy", cfg).setup()


def test_rows_of_preference_are_refused(base, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", rows=4)
    dataset = {"_component_": "torchtune_qwen25vl.data.preference_dataset", "source": str(pairs)}
    cfg = config(base, tmp_path / "out")
    cfg.dataset = dataset
    with pytest.raises(ValueError, match=r"pairs\.jsonl, row 0: a row of preference is trained on"):
        run(cfg)


# what it does


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "grpo", "beta": 0.01},
        {"name": "dr_grpo", "scale_rewards": "none"},
        {"name": "dapo", "clip_high": 0.3, "scale_rewards": "batch"},
        {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    ],
    ids=lambda loss: loss["name"],
)
def test_every_loss_earns_more(base, tmp_path, loss):
    cfg = config(base, tmp_path, max_steps=24, group_size=8, iterations=2)
    cfg.parts.decoder.lr = 2e-2
    cfg.loss = loss
    cfg.val_dataset, cfg.eval_every_n_steps = cfg.dataset, 24
    run(cfg)
    figures = logged(tmp_path)
    first, last = figures[1], figures[24]
    earned = [
        sum(figures[k]["reward"] for k in steps) / 4 for steps in (range(1, 5), range(21, 25))
    ]
    assert earned[1] > earned[0] + 0.04
    assert first["sampler/largest_difference"] < 1e-5
    assert first["rewards/odd_letters"] == pytest.approx(first["reward"])
    assert ("kl" in last) == (loss["name"] == "grpo")
    assert 0 <= last["val_reward"] <= 1
    lines = [
        json.loads(x) for x in (tmp_path / "answers" / "step_1.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 4 * 8
    assert sum(line["reward"] for line in lines) / 32 == pytest.approx(first["reward"])


def test_the_first_update_is_on_policy_and_later_ones_are_clipped(base, tmp_path):
    run(config(base, tmp_path / "one", max_steps=1, **{"loss.beta": 0.1}))
    first = logged(tmp_path / "one")[1]
    assert first["clipped"] == first["kl"] == 0
    assert first["loss"] == pytest.approx(0, abs=1e-6)  # advantages of a group are centred
    assert first["grad_norm"] > 1e-2
    run(config(base, tmp_path / "two", max_steps=1, iterations=3, **{"parts.decoder.lr": 0.1}))
    assert logged(tmp_path / "two")[1]["clipped"] > 0.05


def assert_near(one, other, rel):
    one, other = logged(one), logged(other)
    assert one.keys() == other.keys()
    for step, figures in one.items():
        for name in ("loss", "grad_norm", "answers", "reward", "answer_tokens"):
            expected = pytest.approx(figures[name], rel=rel, abs=1e-6)
            assert other[step][name] == expected, (step, name)


@pytest.mark.parametrize("parts", [None, FULL], ids=["media frozen", "merger trained"])
def test_packed_or_padded_or_few_in_flight_is_the_same_run(base, tmp_path, parts):
    changes = {} if parts is None else {f"parts.{name}": part for name, part in parts.items()}
    run(config(base, tmp_path / "packed", **changes))
    run(config(base, tmp_path / "padded", pack_to=None, rows_in_flight=3, **changes))
    assert_near(tmp_path / "packed", tmp_path / "padded", rel=1e-4)


def test_mixed_precision_draws_and_trains(base, tmp_path):
    run(config(base, tmp_path, precision="bf16_mixed", max_steps=2))
    figures = logged(tmp_path)[2]
    assert 0 < figures["sampler/difference"] < 0.05
    assert figures["grad_norm"] > 0


def test_goes_on_after_sigkill_bit_for_bit(base, tmp_path):
    made = partial(config, base, rewards=REWARDS)
    own_runs.assert_goes_on_after_sigkill("policy", made, tmp_path, ["reward", "grad_norm"])


def test_two_ranks_equal_one(base, tmp_path):
    rows = {"_component_": SMALL["dataset._component_"], "source": str(base / "few" / "rows.json")}
    validated = {"val_dataset": rows, "eval_every_n_steps": 3}  # the second rank has one row less
    runs = {"lora": validated, "merger": {f"parts.{k}": v for k, v in FULL.items()}}
    own_runs.run_on_two(
        "policy",
        [
            config(base, tmp_path / f"two {title}", gradient_accumulation_steps=1, **changes)
            for title, changes in runs.items()
        ],
    )
    for title, changes in runs.items():
        run(config(base, tmp_path / f"one {title}", **changes))
        assert_near(tmp_path / f"one {title}", tmp_path / f"two {title}", rel=1e-4)
    one, two = (logged(tmp_path / f"{number} lora")[3]["val_reward"] for number in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)


def test_every_image_is_encoded_once_for_its_answers(base, tmp_path):
    """In drawing and in training: as many patches as the distinct images of a step have, twice."""
    made = own_runs.make("policy", config(base, tmp_path, max_steps=1))
    made.setup()
    patches = []
    made.model.vision.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    prompts, grids = [], []
    draw, ready = made.draw, made.ready
    made.draw = lambda model, given, numbers: prompts.extend(given) or draw(model, given, numbers)
    made.ready = lambda data: grids.extend(chain(*data.grids)) or ready(data)
    made.train()
    media = [prompt["encoder_input"]["vision"] for prompt in prompts if "encoder_input" in prompt]
    drawn = sum(len(vision["pixel_values"]) for vision in media)
    trained = sum(t * h * w for t, h, w in grids)  # rows share pictures
    assert sum(patches) == drawn + trained
    assert 0 < trained <= drawn
