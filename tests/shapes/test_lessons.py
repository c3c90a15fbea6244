"""The other lessons on the model of shapes: what they show, and a short run of each."""

import json

import own_runs
import pytest
from omegaconf import OmegaConf

from torchtune_qwen25vl import shapes
from torchtune_qwen25vl.training import exact_match
from torchtune_qwen25vl.weights import load_pretrained

SCENES = [shapes.random_scene(seed) for seed in range(300)]
CONFIGS = own_runs.ROOT / "recipes" / "configs"
QUICK = {
    "max_steps": 2,
    "batch_size": 4,
    "eval_every_n_steps": 2,
    "save_every_n_steps": None,
    "val_dataset.length": 4,
    "dataloader.num_workers": 0,
    "after_training.images": 8,
    "log_every_n_steps": 1,
    "lr_scheduler.num_warmup_steps": 0,
}


def test_a_wrong_scene_has_one_attribute_wrong():
    for scene in SCENES:
        wrong = shapes.one_wrong(scene)
        assert wrong == shapes.one_wrong(scene)
        pairs = zip(scene.attributes, wrong.attributes, strict=True)
        assert sum(right != other for right, other in pairs) == 1
        if wrong.caption != scene.caption:
            assert shapes.score(wrong.caption, scene) == len(scene.attributes) - 1


def test_a_pair_is_the_caption_and_a_wrong_one():
    transform = shapes.tiny_transform()
    pair = shapes.ShapesPairs(transform, length=3, seed=1)[1]
    right = shapes.ShapesDataset(transform, length=3, seed=1)[1]
    scene = shapes.random_scene((1 << 32) + 1)
    said = [transform.decode(one["tokens"].tolist()) for one in (pair, pair["rejected"], right)]
    assert said[0] == said[2] != said[1]
    assert shapes.one_wrong(scene).caption in said[1]


def test_the_reward_is_the_share_of_attributes():
    prompt = shapes.ShapesDataset(shapes.tiny_transform(), length=3, seed=1).prompt(2)
    row = {**prompt["row"], "reference": prompt["reference"]}
    reward = shapes.attributes_right()
    assert reward(prompt["prompt"], prompt["reference"], row) == 1
    assert exact_match()(prompt["prompt"], prompt["reference"], row) == 1
    scene = shapes.random_scene(row["scene"])
    almost = reward("", shapes.one_wrong(scene).caption, row)
    assert almost == pytest.approx(1 - 1 / len(scene.attributes))
    assert reward("", "a", row) == 0
    assert "labels" not in prompt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of shapes that has hardly begun."""
    folder = tmp_path_factory.mktemp("lessons")
    cfg = config("tiny", folder / "tiny")
    own_runs.run("finetune", cfg)
    return folder / "tiny" / "model"


def config(name, output_dir, **changes):
    cfg = OmegaConf.load(CONFIGS / f"shapes_{name}.yaml")
    for key, value in {**QUICK, **changes, "output_dir": str(output_dir)}.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


@pytest.mark.parametrize(
    ("name", "of_model"),
    [("preference", "model_dir"), ("policy", "model_dir"), ("distill", "teacher_dir")],
)
def test_two_steps_of_it(base, tmp_path, name, of_model):
    own_runs.run(name, config(name, tmp_path, **{of_model: str(base)}))
    report = json.loads((tmp_path / "shapes-report.json").read_text())
    assert 0 <= report["attributes"] <= 1
    model, _ = load_pretrained(tmp_path / "model")
    assert len(model.layers) == (2 if name == "distill" else 4)
