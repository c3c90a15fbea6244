"""The strip-wise pixel path equals the straight one bit for bit, whatever is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_image_transform import ARRAY_KINDS, PILLOW_MODES, array_image, fuzz, pillow_image

from torchtune_qwen25vl.transform import Qwen25VLImageTransform, smart_resize
from torchtune_qwen25vl.transform import _straight as straight
from torchtune_qwen25vl.transform._patches import IMAGE_MEAN, IMAGE_STD
from torchtune_qwen25vl.transform._pixels import as_pixels, size

KINDS = (*(mode for mode in PILLOW_MODES if mode != "La"), *ARRAY_KINDS)


def both(image, mean=IMAGE_MEAN, std=IMAGE_STD, **limits):
    """Patches by strips, and straight."""
    transform = Qwen25VLImageTransform(image_mean=mean, image_std=std, **limits)
    pixels = as_pixels(image)
    height, width = smart_resize(*size(pixels), **limits)
    expected = straight.straight_patches(pixels, height, width, mean, std)
    return transform({"image": image})["pixel_values"], expected


def made(kind, width, height):
    return (array_image if kind in ARRAY_KINDS else pillow_image)(kind, width, height)


@pytest.mark.parametrize("kind", KINDS)
def test_strips_equal_the_straight_way(kind):
    """A few sizes: read at once, in several strips, on the grid."""
    for width, height in ((67, 90), (1300, 1250), (84, 56)):
        found, expected = both(made(kind, width, height), max_pixels=100_000)
        assert torch.equal(found, expected)


@settings(fuzz, max_examples=100, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 1500),
    st.integers(1, 1500),
    st.integers(784, 400_000),
    st.lists(st.floats(0.125, 1), min_size=6, max_size=6),
)
def test_random_images(kind, width, height, max_pixels, numbers):
    if max(width, height) > 200 * min(width, height):
        width = height
    limits = {"min_pixels": 784, "max_pixels": max_pixels}
    found, expected = both(made(kind, width, height), numbers[:3], numbers[3:], **limits)
    assert torch.equal(found, expected)


def test_a_level_that_is_off_by_one_is_seen(monkeypatch):
    right = straight._rgb
    monkeypatch.setattr(straight, "_rgb", lambda image: right(image).bitwise_xor(1))
    found, expected = both(made("RGB", 67, 90))
    assert not torch.equal(found, expected)
