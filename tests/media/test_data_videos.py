"""Films to frames: the sampled ones, upright, with the rate they play at."""

import builtins
import struct
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data_samples import save_video
from torchtune_qwen25vl.media import _videos, load_video


def every(total, fps):
    return range(total)


def greys(frames):
    return [round(np.asarray(frame)[32:, 32:].mean() / 20) for frame in frames]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return save_video(tmp_path_factory.mktemp("film") / "film.mp4")


def test_all_frames(film):
    frames, fps = load_video(film, keep=every)
    assert greys(frames) == list(range(10))
    assert fps == 5
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


def test_the_frames_that_are_kept_by_their_number(film):
    asked = []

    def keep(total, fps):
        asked.append((total, fps))
        return [1, 4, 4, 9]

    frames, fps = load_video(film.read_bytes(), keep=keep)
    assert asked == [(10, 5.0)]
    assert greys(frames) == [1, 4, 4, 9]
    assert fps == 2.0


def test_turned_films_stand_upright(film):
    data = film.read_bytes()
    start = data.index(b"tkhd") + 44
    quarter = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    (frame, *_), _ = load_video(data[:start] + quarter + data[start + 36 :], keep=every)
    assert frame.size == (48, 64)
    red = np.asarray(frame).astype(int)[..., 0] - np.asarray(frame)[..., 1]
    assert red[4, -4] > 150  # the corner that was at the top left, a quarter turn clockwise
    assert red[4, 4] < 50


def test_bad_films_are_refused_by_name(tmp_path, film):
    def refused(source, match, keep=every):
        with pytest.raises(ValueError, match=match):
            load_video(source, keep=keep)

    def none(total, fps):
        raise ValueError(f"none of {total}")

    (tmp_path / "text.mp4").write_text("no film")
    refused(tmp_path / "text.mp4", "text.mp4: cannot be read as a video")
    refused(tmp_path / "gone.mp4", "gone.mp4: no such file")
    refused(film, "film.mp4: none of 10", none)
    data = save_video(tmp_path / "front.mp4", 40, movflags="faststart").read_bytes()
    load_video(data, keep=every)
    refused(data[: len(data) * 2 // 3], "cut short|cannot be read")


def test_a_film_without_a_rate_is_refused(film, monkeypatch):
    """PyAV gives a still GIF none, or since 19 one that it makes up."""
    opened = _videos._opened

    @contextmanager
    def without_a_rate(*arguments):
        with opened(*arguments) as container:
            stream = SimpleNamespace(frames=0, average_rate=None)
            streams = SimpleNamespace(video=[stream])
            demux = partial(container.demux, container.streams.video[0])
            yield SimpleNamespace(streams=streams, demux=lambda stream: demux())

    monkeypatch.setattr(_videos, "_opened", without_a_rate)
    with pytest.raises(ValueError, match=r"film.mp4: .*at what rate its frames pass"):
        load_video(film, keep=every)


def test_whatever_a_decoder_raises_names_the_file(film, monkeypatch):
    for step in ("_count", "_decode"):
        for raised in (
            TypeError("odd"),
            KeyError("odd"),
            UnicodeDecodeError("utf-8", b"", 0, 1, "odd"),
        ):

            def fail(*arguments, error=raised):
                raise error

            monkeypatch.setattr(_videos, step, fail)
            with pytest.raises(ValueError, match=r"film.mp4: cannot be read as a video .*odd"):
                load_video(film, keep=every)
        monkeypatch.undo()


def test_a_film_of_one_frame(tmp_path):
    frames, fps = load_video(save_video(tmp_path / "one.mp4", num_frames=1), keep=every)
    assert (greys(frames), fps) == ([0], 5.0)


def test_without_pyav_the_error_says_what_to_install(film, monkeypatch):
    real = builtins.__import__

    def without_av(name, *rest):
        if name == "av":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ImportError, match=r"torchtune-qwen25vl\[video\]"):
        load_video(film, keep=every)
