"""Frames of a video: those the transform would keep, and a rate at which it keeps them again."""

import pytest

from tests.data_samples import transform
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
