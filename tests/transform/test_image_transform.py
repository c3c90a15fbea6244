"""The image transform: equal to theirs bit for bit, or one named error."""

import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from parity import photos, reference
from torchtune_qwen25vl.transform import _patches, _pixels
from torchtune_qwen25vl.transform._image import Qwen25VLImageTransform, smart_resize
from torchtune_qwen25vl.transform._pixels import as_pixels

ROOT = pathlib.Path(__file__).parents[2]
BYTES_PER_PIXEL = {
    **dict.fromkeys(("L", "P"), 1),
    **dict.fromkeys(("LA", "La", "PA", "I;16", "I;16B", "I;16L", "I;16N"), 2),
    **dict.fromkeys(("RGB", "YCbCr", "HSV", "LAB"), 3),
    **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK"), 4),
}
PILLOW_MODES = (*BYTES_PER_PIXEL, "1", "I", "F")
ARRAY_KINDS = tuple(
    f"{kind} of {channels}, channels {end}"
    for kind in ("tensor", "array")
    for channels in (1, 3, 4)
    for end in ("first", "last")
)


def pillow_image(mode, width, height, transparency=None, seed=0):
    """Noise in any mode: in I and F also values that no byte holds."""
    rng = np.random.default_rng(seed)
    if mode == "1":
        return pillow_image("L", width, height, seed=seed).convert("1")
    if mode == "I":
        return Image.fromarray(rng.integers(-1000, 70000, (height, width), dtype=np.int32))
    if mode == "F":
        return Image.fromarray(rng.uniform(-50, 350, (height, width)).astype(np.float32))
    image = Image.frombytes(
        mode, (width, height), rng.bytes(width * height * BYTES_PER_PIXEL[mode])
    )
    if mode in ("P", "PA"):
        image.putpalette(rng.bytes(768))
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def array_image(kind, width, height, seed=0):
    """Noise as a tensor or array; `kind` is one of ARRAY_KINDS."""
    container, _, channels, _, end = kind.replace(",", "").split()
    shape = (int(channels), height, width) if end == "first" else (height, width, int(channels))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(values) if container == "tensor" else values


def noise(width, height):
    return pillow_image("RGB", width, height)


def theirs(image, **options):
    output = reference.image_processor(**options)(image, return_tensors="pt")
    return output["pixel_values"], output["image_grid_thw"]


def ours(image, **options):
    output = Qwen25VLImageTransform(**options)({"image": image})
    return output["pixel_values"], output["image_grid_thw"]


def same(mine, their):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, their, strict=True))


def assert_same(image, **options):
    assert same(ours(image, **options), theirs(image, **options))


@pytest.mark.parametrize("mode", [mode for mode in PILLOW_MODES if mode != "La"])
@pytest.mark.parametrize("height", [67, 84])  # resized, and on the grid
def test_pillow_modes(mode, height):
    assert_same(pillow_image(mode, 112, height))


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("P", 3), ("P", bytes(range(256))), ("RGB", (10, 20, 30)), ("L", 7), ("1", 0), ("I;16", 900)],
)
def test_transparency_chunk(mode, transparency):
    image = pillow_image(mode, 50, 40)
    if mode == "RGB":
        transparency = image.getpixel((0, 0))
    image.info["transparency"] = transparency
    assert_same(image)
    assert image.info["transparency"] == transparency


@pytest.mark.parametrize("kind", ARRAY_KINDS)
def test_tensors_and_arrays(kind):
    assert_same(array_image(kind, 61, 90))
    assert_same(array_image(kind, 56, 84))


@pytest.mark.parametrize("shape", [(3, 50, 3), (4, 30, 1), (1, 20, 4), (3, 3, 3), (1, 1, 3)])
def test_the_first_axis_wins_where_both_could_count_channels(shape):
    assert_same(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("name", photos.PHOTOS)
def test_photos(name):
    assert_same(photos.photo(name))
    assert_same(photos.photo(name), max_pixels=50176)


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *((1, 1), (13, 13), (13, 300), (1, 200), (200, 1), (27, 29)),  # under a patch
        *((14, 14), (42, 70), (98, 154), (42, 1000)),  # ties in rounding
        *((1400, 7), (3, 600)),  # 200 times as long as wide
        *((28, 28), (56, 56), (280, 392), (1008, 980)),  # on the grid
        *((640, 480), (37, 3000), (1500, 1100)),
    ],
)
def test_sizes(width, height):
    assert_same(noise(width, height))


@pytest.mark.parametrize("patch_size", [7, 14, 16])
@pytest.mark.parametrize("merge_size", [1, 2, 3])
@pytest.mark.parametrize("temporal_patch_size", [1, 2, 3])
def test_other_patches(patch_size, merge_size, temporal_patch_size):
    sizes = {"patch_size": patch_size, "merge_size": merge_size}
    assert_same(noise(123, 77), temporal_patch_size=temporal_patch_size, **sizes)


def test_other_normalisation():
    assert_same(noise(60, 80), image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.5, 1.0])


def test_other_dtype_and_other_default_dtype():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # as inside a recipe
        transform = Qwen25VLImageTransform(dtype=torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    values = transform({"image": noise(60, 80)})["pixel_values"]
    assert torch.equal(values, theirs(noise(60, 80))[0].bfloat16())


def test_upstream_goldens():
    assert smart_resize(561, 278) == (560, 280)
    values, grid_thw = ours(noise(1024, 1024))
    assert values.shape == (4900, 1176)
    assert grid_thw.tolist() == [[1, 70, 70]]
    assert ours(noise(1024, 1024), min_pixels=784, max_pixels=3136)[0].shape == (16, 1176)


def test_patches_lie_in_block_order():
    rows = torch.arange(56, dtype=torch.uint8).view(1, -1, 1).expand(3, -1, 56).contiguous()
    columns = rows.transpose(1, 2).contiguous()
    firsts = []
    for image in (rows, columns):
        values = ours(image, image_mean=[0] * 3, image_std=[1 / 255] * 3)[0]
        firsts.append((values.view(16, 3, 2, 14, 14)[:, 0, 0, 0, 0] / 14).round().int().tolist())
    assert firsts[0] == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    assert firsts[1] == [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3]


def test_smart_resize_equals_theirs():
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, np.log(9000), (20000, 2))).astype(int).tolist()
    limits = np.sort(np.exp(rng.uniform(0, np.log(1e7), (20000, 2))).astype(int)).tolist()
    for (height, width), (low, high) in zip(sides, limits, strict=True):
        if max(height, width) > 200 * min(height, width):
            continue
        mine = smart_resize(height, width, min_pixels=low, max_pixels=high)
        assert mine == reference.smart_resize(height, width, min_pixels=low, max_pixels=high)
        assert min(mine) >= 28


def test_the_sample_is_left_alone_and_passed_on():
    sample = {"image": noise(30, 40), "caption": "noise"}
    output = Qwen25VLImageTransform()(sample)
    assert list(sample) == ["image", "caption"]
    assert list(output) == ["image", "caption", "pixel_values", "image_grid_thw"]
    assert output["caption"] == "noise"


def test_only_pixels_count_not_how_they_lie_in_memory():
    clean = array_image("tensor of 3, channels first", 33, 52)
    wide = torch.zeros(3, 104, 99, dtype=torch.uint8)
    wide[:, ::2, ::3] = clean
    expected = ours(clean)
    for image in (
        clean.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        clean.transpose(1, 2).contiguous().transpose(1, 2),
        wide[:, ::2, ::3],
        clean.permute(1, 2, 0).numpy(),
    ):
        assert same(ours(image), expected)
    # An axis of length 1 may have any stride. Theirs goes wrong on this one.
    column = array_image("tensor of 3, channels first", 1, 20)
    assert same(ours(column.as_strided((3, 20, 1), (20, 1, 60))), ours(column))


def test_a_read_only_array_is_read_without_a_warning():
    array = array_image("array of 3, channels last", 30, 40)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(ours(array), ours(array.copy()))


def test_strips_of_any_height_give_the_same(monkeypatch):
    images = [noise(300, 500), array_image("array of 4, channels last", 300, 500)]
    expected = [ours(image) for image in images]
    for strip_bytes in (1, 5000, 70000, 1 << 30):
        monkeypatch.setattr(_pixels, "READ_BYTES", strip_bytes)
        monkeypatch.setattr(_patches, "WORK_BYTES", strip_bytes)
        assert all(same(ours(image), right) for image, right in zip(images, expected, strict=True))


def test_memory_of_pillow_in_pieces_is_copied(monkeypatch):
    image = noise(300, 500)
    expected = ours(image)

    def refuse(image):
        raise ValueError("Image rows are not contiguous in memory.")

    monkeypatch.setattr(_pixels.pyarrow, "array", refuse)
    assert same(ours(image), expected)


def resize_with(antialias, dtype, interpolation=tvf.InterpolationMode.BICUBIC):
    def resize(pixels, height, width):
        resized = tvf.resize(
            pixels.to(dtype), [height, width], interpolation=interpolation, antialias=antialias
        )
        return resized.round().clamp(0, 255).to(torch.uint8)

    return resize


def resize_by_pillow(pixels, height, width):
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "resize",
    [
        resize_with(False, torch.uint8),
        resize_with(True, torch.uint8, tvf.InterpolationMode.BILINEAR),
        resize_with(True, torch.float32),
        resize_by_pillow,
    ],
    ids=["not antialiased", "bilinear", "in float", "by Pillow"],
)
def test_every_other_resize_differs(monkeypatch, resize):
    image = photos.photo("astronaut.png").resize((640, 480)).resize((700, 480))
    expected, _ = theirs(image, max_pixels=100000)
    monkeypatch.setattr(_pixels, "_resize", resize)
    assert (ours(image, max_pixels=100000)[0] - expected).abs().max() > 0.014  # one level of 255


def zero_to_one(shape):
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("photo.jpg", r"got str; files are read by the loader in torchtune_qwen25vl\.media"),
        (b"\xff\xd8", "got bytes"),
        (None, "got NoneType"),
        ([noise(28, 28)], "got list"),
        (zero_to_one((28, 28, 3)), "got float32; values from 0 to 1 become that by times 255"),
        (torch.zeros(3, 28, 28), "got torch.float32"),
        (np.zeros((28, 28, 3), bool), "got bool"),
        (np.zeros((28, 28), np.uint8), r"got \[28, 28\]; pass one image at a time"),
        (np.zeros((2, 28, 28, 3), np.uint8), "pass one image at a time"),
        (np.zeros((28, 28, 2), np.uint8), r"one of \[1, 3, 4\], got \[28, 28, 2\]"),
        (torch.zeros(5, 28, 28, dtype=torch.uint8), "convert the image to RGB"),
        (Image.new("RGB", (0, 5)), "got 5 x 0"),
        (np.zeros((3, 0, 9), np.uint8), "got 0 x 9"),
        (Image.new("RGB", (2001, 10)), "at most 200 times the other, got 10 x 2001"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        Qwen25VLImageTransform()({"image": image})


@pytest.mark.parametrize("limits", [(5000, 4000), (0, 4000), (-1, 5), (0, 0)])
def test_bad_limits_are_refused_at_once(limits):
    low, high = limits
    with pytest.raises(ValueError, match=f"got min_pixels={low} and max_pixels={high}"):
        Qwen25VLImageTransform(min_pixels=low, max_pixels=high)
    with pytest.raises(ValueError, match="0 < min_pixels <= max_pixels"):
        smart_resize(100, 100, min_pixels=low, max_pixels=high)


def test_as_pixels_is_a_view():
    array = array_image("array of 3, channels last", 30, 40)
    pixels = as_pixels(array)
    assert pixels.shape == (3, 40, 30)
    assert pixels.data_ptr() == array.ctypes.data


SIDES = st.one_of(st.integers(0, 60), st.integers(61, 400), st.sampled_from([28, 42, 56, 70, 280]))
LIMITS = st.one_of(st.integers(1, 4000), st.integers(4000, 120000))


@st.composite
def pictures(draw):
    kind, width, height = (
        draw(st.sampled_from(PILLOW_MODES + ARRAY_KINDS)),
        draw(SIDES),
        draw(SIDES),
    )
    seed = draw(st.integers(0, 9))
    if kind in ARRAY_KINDS:
        return array_image(kind, width, height, seed)
    transparency = draw(st.sampled_from([None, 0, 200])) if kind in ("L", "P") else None
    return pillow_image(kind, width, height, transparency, seed)


options = st.fixed_dictionaries(
    {"min_pixels": LIMITS, "max_pixels": LIMITS},
    optional={
        "patch_size": st.sampled_from([7, 16]),
        "merge_size": st.sampled_from([1, 3]),
        "temporal_patch_size": st.sampled_from([1, 3]),
    },
)


def equal_or_one_error(image, options):
    """Ours equals theirs, or stops with ValueError: where theirs stops, or limits are swapped."""
    try:
        expected = theirs(image, **options)
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError):
        expected = None
    if expected is None or options["min_pixels"] > options["max_pixels"]:
        with pytest.raises(ValueError):
            ours(image, **options)
    else:
        assert same(ours(image, **options), expected)


fuzz = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(fuzz, max_examples=500, derandomize=True)
@given(pictures(), options)
def test_500_random_images(image, options):
    equal_or_one_error(image, options)


@pytest.mark.slow
@settings(fuzz, max_examples=10_000)
@given(pictures(), options)
def test_10000_random_images(image, options):
    equal_or_one_error(image, options)


MEMORY = """
import runpy, torch
from torchtune_qwen25vl import Qwen25VLImageTransform

peak_memory = runpy.run_path("parity/bench/memory.py")["peak_memory"]
noise = runpy.run_path("parity/photos.py")["noise"]
image, transform = noise(4000, 3000), Qwen25VLImageTransform(max_pixels=12845056)
size = transform({"image": image})["pixel_values"].numel()

def with_a_float_copy():
    return torch.ones(size // 2), transform({"image": image})

# what the interpreter needs by the way comes on top, and not each time
print(min(peak_memory(lambda: transform({"image": image})) for _ in range(2)) / (4 * size))
print(peak_memory(with_a_float_copy) / (4 * size))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from Linux's /proc")
def test_memory():
    """In a fresh process, whose allocator keeps nothing back."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, cwd=ROOT
    )
    peak, control = map(float, run.stdout.split())
    assert peak <= 1.2
    assert control > 1.5
