"""The other lessons on the model of shapes: what they show. test_readme runs each."""

import pytest

from torchtune_qwen25vl import shapes
from torchtune_qwen25vl.training import exact_match

SCENES = [shapes.random_scene(seed) for seed in range(300)]


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
