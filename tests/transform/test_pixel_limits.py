"""Pixel limits are read and written as transformers reads them, in all its forms."""

import json

import pytest

from parity import reference
from torchtune_qwen25vl.transform._pixel_limits import read_pixel_limits, write_pixel_limits

HUB = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
SAVED = {"size": {"shortest_edge": 784, "longest_edge": 50176}, "patch_size": 14}
FORMS = [
    {"preprocessor_config.json": HUB},
    {"preprocessor_config.json": SAVED},
    {"preprocessor_config.json": SAVED | {"min_pixels": None, "max_pixels": 40000}},
    {"preprocessor_config.json": HUB, "processor_config.json": {"processor_class": "P"}},
    {"preprocessor_config.json": HUB, "processor_config.json": {"image_processor": SAVED}},
]
forms = pytest.mark.parametrize("form", FORMS, ids=["hub", "saved", "both", "flat", "nested"])


def write(folder, form):
    for name, settings in form.items():
        (folder / name).write_text(json.dumps(settings))


def limits_of_theirs(folder):
    size = reference.Qwen2VLImageProcessor.from_pretrained(folder).size
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


@forms
def test_the_limits_in_force_are_read(tmp_path, form):
    write(tmp_path, form)
    assert read_pixel_limits(tmp_path) == limits_of_theirs(tmp_path)


@forms
@pytest.mark.parametrize("given", [{"max_pixels": 9408}, {"min_pixels": 1568, "max_pixels": 9408}])
def test_limits_that_are_written_are_in_force(tmp_path, form, given):
    write(tmp_path, form)
    before = limits_of_theirs(tmp_path)
    write_pixel_limits(tmp_path, **{"min_pixels": None, "max_pixels": None} | given)
    assert limits_of_theirs(tmp_path) == before | given
    assert read_pixel_limits(tmp_path) == before | given


def test_other_settings_stay(tmp_path):
    write(tmp_path, {"preprocessor_config.json": HUB})
    write_pixel_limits(tmp_path, min_pixels=None, max_pixels=9408)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written == HUB | {"max_pixels": 9408}


def test_nothing_given_writes_nothing(tmp_path):
    write_pixel_limits(tmp_path, min_pixels=None, max_pixels=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_processor_gets_one(tmp_path):
    write_pixel_limits(tmp_path, min_pixels=1568, max_pixels=9408)
    assert limits_of_theirs(tmp_path) == {"min_pixels": 1568, "max_pixels": 9408}


def test_limits_without_a_file_are_not_guessed(tmp_path):
    with pytest.raises(ValueError, match=r"no preprocessor_config.json, so the pixel limits are"):
        read_pixel_limits(tmp_path)
