"""The example that learns: its pictures, its score, and a short run of it."""

import dataclasses
import functools
import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets._sft import SFTTransform
from training_on_ranks import RECIPE, run
from training_samples import from_dataset

from parity import shapes as against_transformers
from torchtune_qwen25vl import shapes
from torchtune_qwen25vl.shapes import __main__ as images_command
from torchtune_qwen25vl.shapes._report import read_losses
from torchtune_qwen25vl.shapes._scenes import COLOURS, COUNTS, RELATIONS, SHAPES

SCENES = [shapes.random_scene(seed) for seed in range(600)]


def of_kind(kind):
    return next(scene for scene in SCENES if scene.kind == kind)


def test_every_kind_of_scene_and_every_attribute_occurs():
    assert {scene.kind for scene in SCENES} == {"relation", "count", "digit"}
    said = {attribute for scene in SCENES for attribute in scene.attributes}
    assert len(said) == 6 + 4 + 4 + 3 + 10  # colours, shapes, relations, counts, digits


def test_the_same_seed_draws_the_same_picture():
    first, again, other = (shapes.draw(shapes.random_scene(seed)) for seed in (5, 5, 6))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_pictures_come_in_several_sizes():
    sizes = {shapes.draw(scene).size for scene in SCENES[:100]}
    assert len(sizes) == 5
    assert len({width / height for width, height in sizes}) == 5


def test_labels_are_those_of_the_installed_torchtune(monkeypatch):
    """Its development version shifts them in the dataset, and not in the recipes."""
    stock = shapes.ShapesDataset(shapes.tiny_transform(), length=1, seed=1)[0]
    made = shapes.tiny_transform()({"messages": messages_of_the_first(seed=1)})
    assert torch.equal(torch.tensor(stock["labels"]), from_dataset(made["labels"]))
    assert torch.equal(stock["tokens"], made["tokens"])

    def shifted(self, sample):
        sample = self._model_transform(sample)
        return sample | {"labels": [*sample["labels"][1:].tolist(), CROSS_ENTROPY_IGNORE_IDX]}

    monkeypatch.setattr(SFTTransform, "__call__", shifted)
    later = shapes.ShapesDataset(shapes.tiny_transform(), length=1, seed=1)[0]
    assert later["labels"] == [*made["labels"][1:].tolist(), CROSS_ENTROPY_IGNORE_IDX]


def messages_of_the_first(seed):
    scene = shapes.random_scene(seed << 32)
    return shapes.caption_messages(shapes.draw(scene), scene.caption)


def test_what_is_held_out_is_in_no_training_data():
    held_out = {scene.seed for scene in shapes.held_out_scenes(500)}
    cfg = OmegaConf.load(RECIPE.parent / "configs" / "shapes_tiny.yaml")
    for dataset in (cfg.dataset, cfg.val_dataset):
        first = dataset.seed << 32
        assert not held_out & set(range(first, first + dataset.length))


@pytest.mark.parametrize("kind", ["relation", "count", "digit"])
def test_score_counts_attributes_in_their_places(kind):
    scene = of_kind(kind)
    assert shapes.score(scene.caption, scene) == len(scene.attributes)
    assert shapes.score(f" {scene.caption}\n", scene) == len(scene.attributes)
    wrong = next(s for s in SCENES if s.kind == kind and s.attributes[0] != scene.attributes[0])
    right = sum(a == b for a, b in zip(wrong.attributes, scene.attributes, strict=True))
    assert shapes.score(wrong.caption, scene) == right < len(scene.attributes)
    assert shapes.score(f"{scene.caption} and more", scene) == 0
    other = next(s for s in SCENES if s.kind != kind)
    assert shapes.score(other.caption, scene) == 0
    assert shapes.score("", scene) == 0


def exchanged(scene, one, other):
    attributes = list(scene.attributes)
    attributes[one], attributes[other] = attributes[other], attributes[one]
    return dataclasses.replace(scene, attributes=tuple(attributes))


@pytest.mark.parametrize(
    ("kind", "attributes", "pairs"),
    [
        ("relation", ("red", "circle", "left of", "blue", "square"), [(0, 3), (1, 4)]),
        ("count", ("two", "green", "cross"), []),
        ("digit", ("black", "triangle", "7"), []),
    ],
)
def test_an_attribute_counts_in_its_own_place_only(kind, attributes, pairs):
    """Two colours or shapes exchanged are both wrong; so is any other word in one place."""
    scene = shapes.Scene(kind, attributes, seed=0)
    everything = len(attributes)
    for pair in pairs:
        assert shapes.score(exchanged(scene, *pair).caption, scene) == everything - 2
    both = functools.reduce(lambda made, pair: exchanged(made, *pair), pairs, scene)
    assert shapes.score(both.caption, scene) == everything - 2 * len(pairs)
    words = [COLOURS, SHAPES, RELATIONS, COUNTS, "0123456789"]
    for place, right in enumerate(attributes):
        (others,) = (kinds for kinds in words if right in kinds)
        for word in others:
            changed = (*attributes[:place], word, *attributes[place + 1 :])
            expected = everything - (word != right)
            assert shapes.score(shapes.Scene(kind, changed, 0).caption, scene) == expected


def test_the_larger_of_two_shapes_is_named_first():
    """Else a picture would have two right captions, and half of all relations be luck."""
    for scene in [scene for scene in SCENES if scene.kind == "relation"][:40]:
        image, (_, _, relation, *_) = shapes.draw(scene), scene.attributes
        ground = image.getpixel((0, 0))
        width, height = image.size
        half = (width // 2, height) if "of" in relation else (width, height // 2)
        near = image.crop((0, 0, *half))
        far = image.crop((width - half[0], height - half[1], width, height))
        inked = [sum(p != ground for p in part.get_flattened_data()) for part in (near, far)]
        first = inked[relation in ("right of", "below")]
        assert first == max(inked), scene.caption


def test_pictures_as_files(tmp_path):
    images_command.main([str(tmp_path / "pictures"), "--count", "3"])
    written = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in written] == ["000.png", "001.png", "002.png"]
    drawn = [shapes.draw(scene) for scene in shapes.held_out_scenes(3)]
    assert [Image.open(path).tobytes() for path in written] == [p.tobytes() for p in drawn]


def test_losses_of_a_resumed_run_are_read_once(tmp_path):
    (tmp_path / "log_1.txt").write_text(
        "Step 10 | loss:2.0 lr_decoder:0.1 \nStep 10 | val_loss:1.5 \nStep 20 | loss:9.0 \n"
    )
    (tmp_path / "log_2.txt").write_text("Step 20 | loss:1.0 lr_decoder:0.1 \n")
    expected = {"loss": {10: 2.0, 20: 1.0}, "val_loss": {10: 1.5}}
    assert read_losses(tmp_path) == expected


def test_two_minutes_of_it(tmp_path):
    """150 of its steps: more than half of all attributes, blank images no better than luck."""
    cfg = OmegaConf.load(RECIPE.parent / "configs" / "shapes_tiny.yaml")
    cfg.output_dir = str(tmp_path)
    cfg.max_steps = 150
    cfg.after_training.images = 200
    run(cfg)
    found = json.loads((tmp_path / "shapes-report.json").read_text())
    assert found["attributes"] > 0.5
    assert found["attributes_blank"] <= found["attributes_constant"] + 0.05 < 0.3
    assert against_transformers.differing(tmp_path / "model", images=200) == 0
    assert 0 < found["seconds"] < math.inf
    for name in ("loss-curve.png", "captions.png"):
        assert Image.open(tmp_path / name).size[0] >= 800
    losses = read_losses(tmp_path / "logs")
    assert losses["loss"][150] < 0.5 * losses["loss"][10]
    assert set(losses["val_loss"]) == {150}
