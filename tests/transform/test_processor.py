"""A checkpoint's processor settings are read as transformers reads them, or refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from torchtune.data import Message

from parity import reference, vocabulary
from parity.reference import processors
from tests.data_samples import SAYINGS, picture
from torchtune_qwen25vl import Qwen25VLTransform
from torchtune_qwen25vl.transform._processor import read_processor, write_pixel_limits

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


def limits_of_ours(folder):
    return {name: read_processor(folder)[name] for name in ("min_pixels", "max_pixels")}


def limits_of_theirs(folder):
    size = reference.Qwen2VLImageProcessor.from_pretrained(folder).size
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


@forms
def test_the_limits_in_force_are_read(tmp_path, form):
    write(tmp_path, form)
    assert limits_of_ours(tmp_path) == limits_of_theirs(tmp_path)


@forms
@pytest.mark.parametrize("given", [{"max_pixels": 9408}, {"min_pixels": 1568, "max_pixels": 9408}])
def test_limits_that_are_written_are_in_force(tmp_path, form, given):
    write(tmp_path, form)
    before = limits_of_theirs(tmp_path)
    write_pixel_limits(tmp_path, **{"min_pixels": None, "max_pixels": None} | given)
    assert limits_of_theirs(tmp_path) == before | given
    assert limits_of_ours(tmp_path) == before | given


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
        read_processor(tmp_path)


# against transformers' own processors -----------------------------------------------------------

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.5, 1.0]
VIDEO_SIZE = {"shortest_edge": 784, "longest_edge": 9408}
FRAMES = np.random.default_rng(0).integers(0, 256, (12, 120, 160, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer and no processor."""
    shutil.copy(vocabulary.small(SAYINGS) / "tokenizer.json", tmp_path)
    return tmp_path


def patches_of_ours(folder, part, **arguments):
    messages = [Message("user", [part]), Message("assistant", "So.")]
    made = Qwen25VLTransform.from_folder(folder, **arguments)({"messages": messages})
    return made["encoder_input"]["vision"]


def image_of_theirs(folder, image):
    output = reference.Qwen2VLImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    return output["pixel_values"], output["image_grid_thw"]


def video_of_theirs(folder, fps, frames=FRAMES):
    processor = processors.Qwen2VLVideoProcessor.from_pretrained(folder)
    metadata = processors.VideoMetadata(total_num_frames=len(frames), fps=fps)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    output = processor(video, video_metadata=metadata, return_tensors="pt")
    return output["pixel_values_videos"], output["video_grid_thw"]


def assert_same(vision, theirs):
    assert torch.equal(vision["grid_thw"], theirs[1])
    assert torch.equal(vision["pixel_values"], theirs[0])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": VIDEO_SIZE},
        {"min_pixels": 784, "max_pixels": 9408},
        {"image_mean": MEAN},
        {"image_std": STD, "image_mean": MEAN, "max_pixels": 3136},
        {"do_rescale": True, "rescale_factor": 1 / 255, "min_pixels": None, "resample": 3},
    ],
    ids=["size", "limits", "mean", "mean and std", "what is computed"],
)
def test_settings_of_images_are_honoured(folder, settings, nested):
    written = {"image_processor_type": "Qwen2VLImageProcessor", **settings}
    path = "processor_config.json" if nested else "preprocessor_config.json"
    write(folder, {path: {"image_processor": written} if nested else written})
    image = picture(300, 200)
    made = patches_of_ours(folder, {"type": "image", "content": image})
    assert_same(made, image_of_theirs(folder, image))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": VIDEO_SIZE},
        {"min_pixels": 784, "max_pixels": 9408},
        {"image_mean": MEAN, "image_std": STD},
        {"do_sample_frames": True, "fps": 2},
        {"do_sample_frames": True, "num_frames": 6},
        {"do_sample_frames": True, "fps": 1, "min_frames": 6, "max_frames": 10},
        {"do_sample_frames": False, "fps": 2},
        {"size": VIDEO_SIZE, "cap_pixels_per_frame": True, "max_video_tokens": 20},
    ],
    ids=["size", "limits", "mean and std", "fps", "number", "least", "not sampled", "capped"],
)
def test_settings_of_videos_are_honoured(folder, settings, nested):
    written = {"video_processor_type": "Qwen2VLVideoProcessor", **settings}
    if nested:
        whole = {"image_processor": HUB, "video_processor": written}
        write(folder, {"processor_config.json": whole})
    else:
        write(folder, {"preprocessor_config.json": HUB, "video_preprocessor_config.json": written})
    made = patches_of_ours(folder, {"type": "video", "content": FRAMES, "fps": 4.0})
    assert_same(made, video_of_theirs(folder, 4.0))


def test_a_video_without_settings_has_the_normalisation_of_images(folder):
    write(folder, {"preprocessor_config.json": HUB | {"image_mean": MEAN, "image_std": STD}})
    large = FRAMES.repeat(3, axis=1).repeat(3, axis=2)  # within the pixel limits of both
    made = patches_of_ours(folder, {"type": "video", "content": large, "fps": 4.0})
    assert_same(made, video_of_theirs(folder, 4.0, large))


def test_size_may_hold_pixels_by_their_old_names(folder):
    write(folder, {"preprocessor_config.json": {"size": {"min_pixels": 784, "max_pixels": 9408}}})
    assert limits_of_ours(folder) == {"min_pixels": 784, "max_pixels": 9408}


def test_arguments_go_before_settings(folder):
    video = {"do_sample_frames": True, "fps": 2, "min_pixels": 784, "max_pixels": 9408}
    write(folder, {"preprocessor_config.json": HUB, "video_preprocessor_config.json": video})
    made = Qwen25VLTransform.from_folder(folder, max_pixels=50176, video={"num_frames": 4})
    assert (made.min_pixels, made.max_pixels) == (3136, 50176)
    assert made.video_transform.max_pixels == 9408
    sampling = made.video_transform.sampling
    assert (sampling["num_frames"], sampling["fps"]) == (4, None)


@pytest.mark.parametrize("about", ["preprocessor_config.json", "video_preprocessor_config.json"])
@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"do_rescale": False}, "do_rescale = False, but pixels are made with True only"),
        ({"do_normalize": False}, "do_normalize = False"),
        ({"do_normalize": None}, "do_normalize = None"),  # which turns it off, too
        ({"do_resize": False}, "do_resize = False"),
        ({"do_convert_rgb": False}, "do_convert_rgb = False"),
        ({"resample": 2}, "resample = 2, but pixels are made with 3 only"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor = 0.00784"),
        ({"patch_size": 16}, "patch_size = 16, but pixels are made with 14 only"),
        ({"temporal_patch_size": 1}, "temporal_patch_size = 1"),
        ({"merge_size": 4}, "merge_size = 4"),
        ({"size": {"height": 336, "width": 336}}, "resized to a number of pixels"),
        ({"size": 336}, "resized to a number of pixels"),
        ({"max_pixels": "many"}, "max_pixels = 'many', but it is a whole number"),
        ({"min_pixels": 0}, "min_pixels = 0, but it is a whole number above 0"),
        ({"size": {"longest_edge": -5}, "max_pixels": None}, "max_pixels = -5, but it is a whole"),
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type = 'CLIPImageProc"),
        ({"video_processor_type": "LlavaVideoProcessor"}, "it is one that begins with Qwen2VL or"),
        ({"image_std": [0.5, float("nan"), 1.0]}, "image_std = .0.5, nan, 1.0., but it is a num"),
        ({"image_mean": [0.5]}, "image_mean = .0.5., but it is a number for each of 3"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
    ],
)
def test_other_settings_are_refused_by_name(folder, about, settings, rule):
    write(folder, {"preprocessor_config.json": HUB, about: HUB | settings})
    with pytest.raises(ValueError, match=rule) as error:
        Qwen25VLTransform.from_folder(folder)
    assert str(error.value).startswith(str(folder / about))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"do_sample_frames": True, "fps": -2}, "fps is a number above 0, got -2"),
        ({"do_sample_frames": True, "fps": "2"}, "fps is a number above 0, got '2'"),
        (
            {"do_sample_frames": True, "num_frames": 0},
            "num_frames is a whole number above 0, got 0",
        ),
        ({"do_sample_frames": True, "fps": 2, "num_frames": 4}, "exclude each other"),
        ({"min_frames": "few"}, "min_frames is a whole number above 0, got 'few'"),
        ({"max_frames": 2.5}, "max_frames is a whole number above 0, got 2.5"),
        ({"min_frames": 8, "max_frames": 6}, "got 8 and 6; are they swapped"),
        ({"do_sample_frames": "yes"}, "do_sample_frames = 'yes', but it is true or false"),
        ({"cap_pixels_per_frame": "no"}, "cap_pixels_per_frame = 'no', but it is true or false"),
        ({"cap_pixels_per_frame": True, "max_video_tokens": "x"}, "max_video_tokens = 'x', but"),
    ],
)
def test_frames_that_cannot_be_are_refused_by_name(folder, settings, rule):
    video = {"video_preprocessor_config.json": settings, "preprocessor_config.json": HUB}
    write(folder, video)
    with pytest.raises(ValueError, match=rule) as error:
        Qwen25VLTransform.from_folder(folder)
    assert str(error.value).startswith(str(folder / "video_preprocessor_config.json"))


@pytest.mark.parametrize("key", ["image_processor", "video_processor"])
def test_a_section_that_holds_no_settings_is_refused(folder, key):
    write(folder, {"preprocessor_config.json": HUB, "processor_config.json": {key: [HUB]}})
    with pytest.raises(ValueError, match=rf"processor_config.json says {key} = .* it is settings"):
        Qwen25VLTransform.from_folder(folder)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"patch_size": 16}, "patch_size = 16, but pixels are made with 14 only"),
        ({"spatial_merge_size": 4}, "merge_size = 4"),
        ({"temporal_patch_size": 1}, "temporal_patch_size = 1"),
    ],
)
def test_a_model_that_takes_other_patches_is_refused(folder, settings, rule):
    config = {"vision_config": {"hidden_size": 32} | settings}
    write(folder, {"preprocessor_config.json": HUB, "config.json": config})
    with pytest.raises(ValueError, match=rf"config.json says .*{rule}"):
        Qwen25VLTransform.from_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]", '"'])
def test_a_damaged_file_is_named(folder, text):
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config.json .*fetch it again"):
        Qwen25VLTransform.from_folder(folder)


def test_unknown_arguments_of_videos_are_named(folder):
    with pytest.raises(ValueError, match=r"video has no frames; it takes min_pixels, .*fps.*dtype"):
        Qwen25VLTransform(folder / "tokenizer.json", video={"frames": 4})


def test_the_geometry_of_a_video_is_not_an_argument(folder):
    with pytest.raises(ValueError, match="but video has merge_size, patch_size; leave it out"):
        Qwen25VLTransform(folder / "tokenizer.json", video={"patch_size": 16, "merge_size": 1})
