"""Frames of a video: those the transform would keep, and a rate at which it keeps them again."""

import pytest
from PIL import Image

from tests.data_samples import save_video, transform, write_jsonl
from torchtune_qwen25vl.data import llava_dataset, swift_dataset
from torchtune_qwen25vl.data._frames import kept_frames, resampled_rate
from torchtune_qwen25vl.transform import sample_frames

EVERY = transform().video_transform.sampling


def sampling(**changes):
    return {**EVERY, **changes}


@pytest.mark.parametrize("rule", ["hf", "qwen_vl_utils"])
@pytest.mark.parametrize("wish", [{"num_frames": 4}, {"fps": 2.0}, {"fps": 3.0}])
def test_the_frames_are_those_the_transform_would_keep(rule, wish):
    settings = sampling(**wish, sampling=rule)
    kept = kept_frames(10, 5.0, settings)
    assert kept == sample_frames(10, source_fps=5.0, **settings).tolist()
    assert len(kept) < 10


def test_sampling_sampled_frames_again_keeps_them_all():
    """Rates are found at which the transform drops none; rates as computed drop some."""
    dropped = 0
    for total in range(8, 1600):
        source_fps, wish = (15.0, 24.0, 30000 / 1001)[total % 3], (0.7, 1.5, 2.0)[total % 9 // 3]
        settings = sampling(fps=wish, sampling=("hf", "qwen_vl_utils")[total % 2])
        count = len(sample_frames(total, source_fps=source_fps, **settings))
        fps = count / total * source_fps
        found = resampled_rate(count, fps, settings)
        again = sample_frames(count, source_fps=found, **settings)
        assert again.tolist() == list(range(count))
        assert found == pytest.approx(fps, rel=1e-15)
        dropped += len(sample_frames(count, source_fps=fps, **settings)) < count
    assert dropped > 0


def test_a_row_cannot_ask_for_frames_the_tokenizer_drops():
    with pytest.raises(ValueError, match="leave its video"):
        resampled_rate(8, 4.0, sampling(fps=1.0))


def test_frames_that_cannot_be_kept_are_refused():
    with pytest.raises(ValueError, match="10 frames would be kept, more than max_frames=8"):
        kept_frames(10, 5.0, sampling(max_frames=8))
    with pytest.raises(ValueError, match="num_frames=40"):
        kept_frames(10, 5.0, sampling(num_frames=40))


# Videos that are folders of frames, and rates that a row says ---------------------------------


@pytest.fixture
def clip(tmp_path):
    """A folder of 12 frames, each of its own grey, whose names sort as numbers."""
    folder = tmp_path / "a [1]" / "clip"
    folder.mkdir(parents=True)
    for k in range(1, 13):
        Image.new("RGB", (56, 56), (20 * k, 0, 0)).save(folder / f"frame{k}.png")
    (folder / "._frame1.png").write_bytes(b"macOS")
    (folder / "about.txt").write_text("12 frames")
    return folder


def row(**media):
    turns = [{"from": "human", "value": "<video>\nWhy?"}, {"from": "gpt", "value": "So."}]
    return {**media, "conversations": turns}


def video_of(folder, options, **media):
    source = write_jsonl(folder / "rows.jsonl", row(**media))
    dataset = llava_dataset(transform(), source=source, **options)
    read = dataset._read(dataset.rows[0])["messages"]
    return next(part for part in read[0].content if part["type"] == "video")


@pytest.mark.parametrize(
    ("options", "fps", "expected"),
    [({}, None, None), ({"fps": 4}, None, 4), ({"fps": 4}, 2.5, 2.5), ({}, [2], 2)],
)
def test_a_folder_is_a_video_of_its_images(clip, options, fps, expected):
    rate = {} if fps is None else {"fps": fps}
    for name in ("clip", str(clip), {"path": "clip"}):
        video = video_of(clip.parent, options, video=name, **rate)
        reds = [frame.getpixel((0, 0))[0] for frame in video["content"]]
        assert reds == [20 * k for k in range(1, 13)]
        assert video.get("fps") == expected


def test_rates_of_several_videos(clip):
    turns = [{"role": "user", "content": "<video><video>?"}, {"role": "assistant", "content": "A."}]
    files = [str(clip / f"frame{k}.png") for k in (1, 2)]
    rows = [
        {"messages": turns, "videos": ["clip", files], "fps": fps} for fps in ([1, 2], 3, [1], "2")
    ]
    dataset = swift_dataset(transform(), source=write_jsonl(clip.parent / "r.jsonl", *rows))
    for index, expected in enumerate(([1, 2], [3, 3])):
        read = dataset._read(dataset.rows[index])["messages"]
        assert [p["fps"] for p in read[0].content if p["type"] == "video"] == expected
    with pytest.raises(ValueError, match=r"one for each video, got \[1\] for 2 videos"):
        dataset[2]
    with pytest.raises(ValueError, match="fps is a number above 0, got '2'"):
        dataset[3]


def test_folders_that_are_no_videos(clip, tmp_path):
    (tmp_path / "empty").mkdir()
    save_video(tmp_path / "v.mp4")
    for media, match in (
        ({"video": "empty"}, "empty: a folder is a video of its images, but it has none"),
        ({"video": "gone"}, "gone: no such file"),
        ({"video": "v.mp4", "fps": 2}, "fps of a row, 2, is the rate of a video that is given as"),
        ({"video": "x" * 5000}, "cannot be a file"),
    ):
        dataset = llava_dataset(
            transform(), source=write_jsonl(tmp_path / "rows.jsonl", row(**media))
        )
        with pytest.raises(ValueError, match=match):
            dataset[0]
