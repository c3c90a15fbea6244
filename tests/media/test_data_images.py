"""Files to pictures: what a person sees, or an error that names the file."""

import base64
import io
import random
import struct
import warnings
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.data_samples import picture
from torchtune_qwen25vl.media import load_image

ORIENTED = {  # EXIF orientation: how the upright picture was turned before it was stored
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def equal(ours, expected):
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def grey16(*values, transparent=None):
    """A PNG of one row of 16-bit greys."""
    row = b"\0" + struct.pack(f">{len(values)}H", *values)
    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    key = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    body = chunk(b"IDAT", zlib.compress(row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", ORIENTED)
def test_pictures_stand_upright(orientation, format):
    upright = picture(5, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(ORIENTED[orientation])
    options = {"lossless": True} if format == "WEBP" else {}
    equal(load_image(encoded(stored, format, exif=exif, **options)), upright)
    assert stored.size != upright.size or not np.array_equal(stored, upright)  # it does matter


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa"])
def test_alpha_lies_on_white(mode):
    color, alpha = picture(4, 2).convert("RGB"), np.array([[0, 85, 170, 255]] * 2, dtype=np.uint8)
    image = color.convert("RGBA")
    image.putalpha(Image.fromarray(alpha))
    image = image.convert(mode)
    seen = np.asarray(load_image(image))
    flat = np.asarray(image.convert("RGBA"), dtype=np.float64)
    expected = flat[..., :3] * flat[..., 3:] / 255 + 255 - flat[..., 3:]
    np.testing.assert_allclose(seen, expected, atol=1)
    assert (seen[:, 0] == 255).all()


@pytest.mark.parametrize(
    ("mode", "key"), [("L", 0), ("P", 0), ("1", 0), ("RGB", (0, 0, 0)), ("P", bytes([0, 255]))]
)
def test_a_transparent_color_is_white(mode, key):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), (9, 9, 9) if mode == "RGB" else 1)
    seen = np.asarray(load_image(encoded(image, transparency=key)))[0]
    assert seen[0].tolist() == [255, 255, 255]
    assert seen[1].tolist() == list(image.convert("RGB").getpixel((1, 0)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted(mode):
    image = picture(6, 4).convert(mode)
    equal(load_image(image), image.convert("RGB"))


def test_16_bit_greys_are_scaled_not_clipped():
    values = [0, 128, 129, 256, 32768, 65535]
    expected = [[0, 0, 1, 1, 128, 255]]
    assert np.asarray(load_image(grey16(*values)))[..., 0].tolist() == expected
    portable = b"P5 2 1 65535\n" + struct.pack(">2H", 32768, 65535)  # Pillow's mode I
    assert np.asarray(load_image(portable))[..., 0].tolist() == [[128, 255]]
    clipped = Image.open(io.BytesIO(grey16(*values))).convert("RGB")
    assert np.asarray(clipped)[0, 4:, 0].tolist() == [255, 255]  # what is avoided
    keyed = load_image(grey16(1000, 0, transparent=1000))
    assert np.asarray(keyed)[..., 0].tolist() == [[255, 0]]


@pytest.mark.parametrize("pixels", [np.float32([[0, 1]]), np.int32([[0, 65536]])])
def test_pixels_without_a_white_are_refused(pixels):
    with pytest.raises(ValueError, match="no defined white"):
        load_image(Image.fromarray(pixels))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("P", (4, 4), k) for k in range(2)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 200, 0])
    equal(
        load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        Image.new("RGB", (4, 4), (200, 0, 0)),
    )


def test_every_way_to_say_where_an_image_is(tmp_path):
    image = picture()
    path = tmp_path / "with space.png"
    image.save(path)
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (
        *(image, path, str(path), path.as_uri(), data, url),
        *({"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, {"bytes": data}),
    ):
        equal(load_image(source), image)
    equal(load_image("with space.png", root=tmp_path), image)


def test_data_urls_in_every_valid_form():
    image = picture(5, 4)
    data = encoded(image, "BMP")
    text = base64.b64encode(data).decode()
    assert text.endswith("=")
    for url in (
        f"data:image/png;base64,{text}",
        f"DATA:image/png;BASE64,{text}",
        f"data:;base64,{text}",
        f"data:image/png;name=a.png; base64,{text}",
        f"data:image/png;base64,{text.rstrip('=')}",
        "data:image/png;base64," + "\n".join(text[k : k + 76] for k in range(0, len(text), 76)),
        "data:image/png;base64," + quote(text, safe=""),
        "data:image/png," + quote(data),
    ):
        equal(load_image(url), image)


def test_nothing_is_changed_in_a_picture_that_is_handed_over():
    image = picture().convert("RGBA")
    exif = image.getexif()
    exif[0x0112] = 6
    before = image.copy()
    load_image(image)
    assert image.size == before.size
    assert image.mode == before.mode
    np.testing.assert_array_equal(image, before)


def refused(source, *, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        load_image(source, **options)
    return str(error.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_is_refused_by_name(tmp_path, format):
    path = tmp_path / f"cut.{format.lower()}"
    data = encoded(picture(200, 100), format)
    path.write_bytes(data[: len(data) // 2])
    assert str(path) in refused(path, match="cannot be|not an image")
    path.write_bytes(data)
    load_image(path)


def test_a_picture_cut_short_never_loads_half_grey(monkeypatch):
    data = encoded(picture(200, 100), "JPEG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    refused(data[: len(data) // 2], match="LOAD_TRUNCATED_IMAGES is on")


def test_what_is_no_image_is_refused_by_name(tmp_path):
    for name, content, match in [
        ("empty.png", b"", "empty"),
        ("text.png", b"not a picture", "not an image"),
        ("cut header.png", encoded(picture())[:20], "not an image|cannot be"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert name in refused(tmp_path / name, match=match)
    assert "gone.png" in refused(tmp_path / "gone.png", match="no such file")
    assert "gone.png" in refused("gone.png", match="no media_root")
    refused(tmp_path, match="no such file")
    assert len(refused("x" * 5000, match="cannot be a file", root=tmp_path)) < 300
    refused("https://example.org/a.png", match="download the file first")
    refused("s3://bucket/a.png", match="download the file first")
    refused("data:image/png,abc", match="data:image/png.: not an image")
    refused("data:image/png;base64", match="comma before its data, this one has none")
    refused("data:image/png;base64,\u00e9", match="damaged")
    refused("data:image/png;base64,@@@", match="damaged")
    refused(b"", match="no bytes")
    refused({"array": 1}, match="'bytes' or 'path'")
    refused(3, match="got int")


def test_pictures_beyond_the_pixel_limit_are_not_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "bomb.png" in refused(tmp_path / "bomb.png", match="2500000000 pixels")
    refused(encoded(picture(20, 10)), match="20x10 is more than pixel_limit=199", pixel_limit=199)
    load_image(encoded(picture(20, 10)), pixel_limit=200)


def test_large_but_allowed_pictures_do_not_warn(monkeypatch):
    data = encoded(picture(15, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(data)
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(data))


def test_damaged_files_load_whole_or_are_refused_by_name(tmp_path):
    """600 files, bytes changed, dropped or repeated: a picture or a ValueError, nothing else."""
    rng, refusals = random.Random(0), {}
    formats = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TGA", "TIFF", "WEBP", "ICO")
    whole = [encoded(picture(40, 30), format) for format in formats]
    for number in range(600):
        data = bytearray(whole[number % len(whole)])
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(data)), rng.randint(1, 30)
            damage = rng.choice([b"", rng.randbytes(length), data[at : at + length] * 2])
            data[at : at + length] = damage
        path = tmp_path / f"{number}.img"
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata
            try:
                assert load_image(path, pixel_limit=10**6).mode == "RGB"
            except ValueError as error:
                refusals[path] = str(error)
    assert all(str(path) in message for path, message in refusals.items())
    assert 100 < len(refusals) < 600
