"""The video transform: equal to theirs bit for bit; frames sampled by either rule."""

import numpy as np
import pytest
import torch
from PIL import Image

from parity import reference
from torchtune_qwen25vl.transform import _video
from torchtune_qwen25vl.transform._image import Qwen25VLImageTransform
from torchtune_qwen25vl.transform._video import Qwen25VLVideoTransform, sample_frames

SMALL = {"min_pixels": 784, "max_pixels": 12544}


def frames(count, height=60, width=80, seed=0):
    """Noise, uint8 [t, h, w, 3]."""
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_input(kind, values):
    return {
        "images": lambda: [Image.fromarray(frame) for frame in values],
        "list of arrays": lambda: list(values),
        "list of tensors": lambda: list(torch.from_numpy(values).permute(0, 3, 1, 2)),
        "array": lambda: values,
        "tensor": lambda: torch.from_numpy(values).permute(0, 3, 1, 2).contiguous(),
        "grey": lambda: values[..., :1],
    }[kind]()


def ours(video, rate=None, **options):
    sample = {"video": video} if rate is None else {"video": video, "fps": rate}
    output = Qwen25VLVideoTransform(**SMALL | options)(sample)
    return tuple(
        output[key] for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
    )


def theirs(video, rate=None, sampling=None, **options):
    limits = SMALL | options
    size = {"shortest_edge": limits.pop("min_pixels"), "longest_edge": limits.pop("max_pixels")}
    return reference.video_patches(video, source_fps=rate, sampling=sampling, size=size, **limits)


def assert_same(mine, their):
    assert torch.equal(mine[0], their[0])
    assert torch.equal(mine[1], their[1])
    assert mine[2] == pytest.approx(their[2], rel=1e-12)


@pytest.mark.parametrize(
    "kind", ["images", "list of arrays", "list of tensors", "array", "tensor", "grey"]
)
def test_every_kind_of_video(kind):
    video = as_input(kind, frames(4))
    assert_same(ours(video), theirs(video))


@pytest.mark.parametrize("temporal_patch_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_frame_counts(count, temporal_patch_size):
    depth = {"temporal_patch_size": temporal_patch_size}
    mine = ours(frames(count), **depth)
    assert_same(mine, theirs(frames(count), **depth))
    assert mine[1][0, 0] == -(-count // temporal_patch_size)


@pytest.mark.parametrize(
    ("height", "width"), [(9, 13), (1, 100), (42, 70), (112, 56), (300, 250), (7, 1400)]
)
def test_sizes(height, width):
    assert_same(ours(frames(3, height, width)), theirs(frames(3, height, width)))


def test_other_patches_and_default_limits():
    video = frames(3, 200, 310)
    patches = {"patch_size": 7, "merge_size": 1, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    assert_same(ours(video, **patches), theirs(video, **patches))
    output = Qwen25VLVideoTransform()({"video": video})
    expected, _, _ = reference.video_patches(video)
    assert torch.equal(output["pixel_values_videos"], expected)


def test_the_last_frame_is_repeated_and_nothing_else_will_do():
    video = frames(3)
    expected, _, _ = theirs(video)
    assert torch.equal(ours(np.concatenate([video, video[-1:]]))[0], expected)
    for wrong in (video[:1], np.zeros_like(video[:1])):
        assert (ours(np.concatenate([video, wrong]))[0] - expected).abs().max() > 1


def test_one_frame_is_an_image():
    image = Image.fromarray(frames(1)[0])
    expected = Qwen25VLImageTransform(**SMALL)({"image": image})["pixel_values"]
    assert torch.equal(ours([image])[0], expected)


def test_frames_of_other_modes_become_rgb_as_images_do():
    image = Image.fromarray(frames(1)[0]).convert("RGBA")
    image.putalpha(100)
    expected = Qwen25VLImageTransform(**SMALL)({"image": image})["pixel_values"]
    assert torch.equal(ours([image, image])[0], expected)


def test_upstream_goldens():
    assert len(ours(frames(8, 80, 80), max_pixels=3136)[0]) == 320 / 5  # they count five videos
    values, grid_thw, _ = ours(frames(5, 28, 28), max_pixels=784, temporal_patch_size=3)
    assert values.shape == (8, 1764)
    assert grid_thw.tolist() == [[2, 2, 2]]
    assert ours(frames(8), num_frames=4)[1][0, 0] == 4 / 2
    assert ours(frames(8), rate=4, fps=3)[1][0, 0] == 6 / 2


def test_total_pixels_lower_the_limit_of_each_frame():
    """128 placeholders for 8 frames, of which nine tenths are used: 256 x 256 become 10 x 10."""
    limits = {"min_pixels": 784, "max_pixels": 602112}
    video = frames(8, 256, 256)
    capped = {"cap_pixels_per_frame": True, "max_video_tokens": 128}
    mine = ours(video, total_pixels=int(0.9 * 128 * 784), **limits)
    assert_same(mine, theirs(video, **limits, **capped))
    assert mine[0].shape[0] == 400
    # Not below 1.05 of the least, however many frames there are.
    limits["min_pixels"], capped["max_video_tokens"] = 20000, 1
    mine = ours(video, total_pixels=int(0.9 * 784), **limits)
    assert_same(mine, theirs(video, **limits, **capped))


@pytest.mark.parametrize("total", [2, 4, 7, 10, 17, 31])
@pytest.mark.parametrize("rate", [4, 24, 29.97])
@pytest.mark.parametrize(
    "sampling", [{}, {"num_frames": 2}, {"num_frames": 5}, {"fps": 1}, {"fps": 3.0}]
)
def test_sampling_as_theirs(total, rate, sampling):
    video = frames(total, 28, 28)
    if sampling.get("num_frames", 0) > total + 1:
        with pytest.raises(ValueError, match=f"at most all {total} frames can be kept, got 4"):
            ours(video, rate, **sampling)
    else:
        assert_same(ours(video, rate, **sampling), theirs(video, rate, sampling))


def test_seconds_without_a_rate():
    """Theirs takes 24 frames a second, qwen-vl-utils takes listed frames for 2 a second."""
    assert_same(ours(frames(4)), theirs(frames(4)))
    assert ours(frames(4))[2] == 2 / 24
    assert ours(frames(4), sampling="qwen_vl_utils")[2] == 1.0


def test_sampling_by_hand():
    def sampled(total, **options):
        return sample_frames(total, **options).tolist()

    utils = {"sampling": "qwen_vl_utils"}
    assert sampled(3) == sampled(3, **utils) == [0, 1, 2]
    assert sampled(10, num_frames=4) == [0, 2, 5, 7]
    assert sampled(10, num_frames=4, **utils) == [0, 3, 6, 9]
    assert sampled(10, num_frames=5) == [0, 2, 5, 7]  # 2.5 pairs round to 2
    # 100 frames at 25 a second, 2 a second: 8 of them, spaced 12.5, or 99 / 7
    assert sampled(100, fps=2, source_fps=25) == [0, 12, 25, 37, 50, 62, 75, 87]
    assert sampled(100, fps=2, source_fps=25, **utils) == [0, 14, 28, 42, 57, 71, 85, 99]
    # the fewest and the most
    assert len(sampled(100, fps=0.1, source_fps=25)) == 4
    assert len(sampled(3000, fps=25, source_fps=25)) == 768
    assert len(sampled(100, fps=0.1, source_fps=25, min_frames=5)) == 4
    assert len(sampled(100, fps=0.1, source_fps=25, min_frames=5, **utils)) == 6
    assert len(sampled(100, fps=25, source_fps=25, max_frames=11)) == 10
    assert len(sampled(5, fps=25, source_fps=25)) == 4


def test_no_index_lies_beyond_the_last_frame():
    """Theirs steps by 17 / 14 in floating point and asks for frame 17 of 17."""
    assert sample_frames(17, num_frames=14).tolist()[-1] == 15
    with pytest.raises(IndexError):
        theirs(frames(17), sampling={"num_frames": 14})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "decord"}, r"one of \['hf', 'qwen_vl_utils'\], got 'decord'"),
        ({"num_frames": 4, "fps": 2}, "num_frames=4 and fps=2 exclude each other"),
        ({"fps": 2}, "fps=2 needs the rate of the video; give it as 'fps'"),
        ({"fps": -2.0}, "fps is a number above 0, got -2.0"),
        ({"max_frames": 0}, "max_frames is a whole number above 0, got 0"),
        ({"num_frames": 12}, "at most all 8 frames can be kept, got 12"),
        ({"num_frames": 1}, "at least 2 and at most all 8 frames can be kept, got 0"),
        ({"min_pixels": 900, "max_pixels": 800}, "min_pixels=900 and max_pixels=800"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ours(frames(8), **options)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("video.mp4", r"got str; files are read by the loader in torchtune_qwen25vl\.media"),
        (frames(1)[0], "of four axes, got ndarray"),
        ([], "got 0 frames"),
        ([frames(1)[0], frames(1, 61)[0]], r"2 frames of the sizes \[\(60, 80\), \(61, 80\)\]"),
        (frames(2).astype(np.float32), "got float32"),
        (np.zeros((2, 30, 40, 4), np.uint8), r"one of \[1, 3\], got \[30, 40, 4\]"),
        ([["a.jpg"]], "got list"),
        (frames(2, 2, 401), "at most 200 times the other"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    with pytest.raises(ValueError, match=message):
        ours(video)


def test_a_rate_is_positive():
    with pytest.raises(ValueError, match="got fps=0; omit 'fps'"):
        ours(frames(2), rate=0)


def test_the_sample_is_left_alone_and_passed_on():
    sample = {"video": frames(2), "fps": 2.0, "caption": "noise"}
    output = Qwen25VLVideoTransform(**SMALL)(sample)
    assert list(sample) == ["video", "fps", "caption"]
    assert set(output) - set(sample) == {
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    }


def test_a_rate_that_is_assumed_is_said_once(caplog):
    _video._say_assumed_rate.cache_clear()
    for _ in range(2):
        ours(frames(4), rate=2.0)
    assert not caplog.records
    for _ in range(2):
        ours(frames(4))
    assert len(caplog.records) == 1
    assert "without 'fps' and are taken to pass at 24.0 a second" in caplog.text
