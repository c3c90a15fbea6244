"""Films to frames: the sampled ones, upright, with the rate they play at."""

import builtins
import struct

import numpy as np
import pytest

from tests.data_samples import save_video, transform
from torchtune_qwen25vl.data import load_video
from torchtune_qwen25vl.media._videos import resampled_rate
from torchtune_qwen25vl.transform._video import sample_frames

EVERY = transform().video_transform.sampling


def sampling(**changes):
    return {**EVERY, **changes}


def greys(frames):
    return [round(np.asarray(frame)[32:, 32:].mean() / 20) for frame in frames]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return save_video(tmp_path_factory.mktemp("film") / "film.mp4")


def test_all_frames_without_sampling(film):
    frames, fps = load_video(film, sampling=EVERY)
    assert greys(frames) == list(range(10))
    assert fps == 5
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.parametrize("rule", ["hf", "qwen_vl_utils"])
@pytest.mark.parametrize("wish", [{"num_frames": 4}, {"fps": 2.0}, {"fps": 3.0}])
def test_the_frames_are_those_the_transform_would_keep(film, rule, wish):
    settings = sampling(**wish, sampling=rule)
    frames, fps = load_video(film.read_bytes(), sampling=settings)
    kept = sample_frames(10, source_fps=5.0, **settings).tolist()
    assert greys(frames) == kept
    assert fps == pytest.approx(len(kept) / 10 * 5, rel=1e-12)
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


def test_turned_films_stand_upright(film):
    data = film.read_bytes()
    start = data.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    (frame, *_), _ = load_video(data[:start] + quarter + data[start + 36 :], sampling=EVERY)
    assert frame.size == (48, 64)
    red = np.asarray(frame).astype(int)[..., 0] - np.asarray(frame)[..., 1]
    assert red[4, -4] > 150  # the corner that was at the top left, a quarter turn clockwise
    assert red[4, 4] < 50


def test_bad_films_are_refused_by_name(tmp_path, film):
    def refused(source, match, settings=EVERY):
        with pytest.raises(ValueError, match=match):
            load_video(source, sampling=settings)

    (tmp_path / "text.mp4").write_text("no film")
    refused(tmp_path / "text.mp4", "text.mp4: cannot be read as a video")
    refused(tmp_path / "gone.mp4", "gone.mp4: no such file")
    refused(film, "10 frames would be kept, more than max_frames=8", sampling(max_frames=8))
    refused(film, "film.mp4: .*num_frames=40", sampling(num_frames=40))
    data = save_video(tmp_path / "front.mp4", 40, movflags="faststart").read_bytes()
    load_video(data, sampling=EVERY)
    refused(data[: len(data) * 2 // 3], "cut short|cannot be read")


def test_without_pyav_the_error_says_what_to_install(film, monkeypatch):
    real = builtins.__import__

    def without_av(name, *rest):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ImportError, match=r"torchtune-qwen25vl\[video\]"):
        load_video(film, sampling=EVERY)
