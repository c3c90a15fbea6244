"""300 files that want to do harm, among them good ones: every one ends in a named state."""

import io
import json
import os
import random
import struct
import zlib

import captions
import numpy as np
import pytest
from PIL import Image

from torchtune_qwen25vl.captioning._prompts import printable

GOOD = 30


def picture(width=40, height=30, mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(side=60_000):
    """A PNG of a few kilobytes whose header promises gigabytes."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def deep_grey(bits=16):
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    return Image.fromarray(values)


def animated(format):
    frames = [picture(seed=k) for k in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def kinds(generator):
    """Name -> (suffix, content or maker, whether it can be captioned), for number k."""

    def cut(format, suffix):
        whole = encoded(picture(seed=generator.randrange(99)), format)
        return suffix, whole[: generator.randrange(1, len(whole) * 2 // 3)], False

    def noise_in(format, suffix):
        data = bytearray(encoded(picture(200, 150), format))
        for _ in range(200):
            data[generator.randrange(len(data))] = generator.randrange(256)
        return suffix, bytes(data), None  # some decoders read on

    jpeg = encoded(picture(), "JPEG")
    yield from (
        lambda: cut("JPEG", ".jpg"),
        lambda: cut("PNG", ".png"),
        lambda: cut("WEBP", ".webp"),
        lambda: cut("TIFF", ".tiff"),
        lambda: noise_in("JPEG", ".jpg"),
        lambda: noise_in("PNG", ".png"),
        lambda: noise_in("GIF", ".gif"),
        lambda: (".png", jpeg, True),  # another format by that name
        lambda: (".jpg", b"", False),
        lambda: (".jpg", b"some text", False),
        lambda: (".bmp", generator.randbytes(500), False),
        lambda: (".png", encoded(deep_grey(), "PNG"), True),
        lambda: (".tif", encoded(deep_grey(), "TIFF"), True),
        lambda: (".jpg", encoded(picture(mode="CMYK"), "JPEG"), True),
        lambda: (".png", encoded(picture(mode="LA"), "PNG"), True),
        lambda: (".png", encoded(picture(mode="1"), "PNG"), True),
        lambda: (".tif", encoded(picture().convert("L").convert("F"), "TIFF"), False),
        lambda: (".png", encoded(picture(1, 1), "PNG"), True),
        lambda: (".png", encoded(picture(1, 5000), "PNG"), False),
        lambda: (".png", encoded(picture(5000, 1), "PNG"), False),
        lambda: (".png", encoded(picture(2, 400), "PNG"), True),
        lambda: (".gif", animated("GIF"), True),
        lambda: (".webp", animated("WEBP"), True),
        lambda: (".png", bomb(), False),
        lambda: (".png", bomb(14_000), False),  # just under the limit of Pillow's warning
        lambda: (".avif", encoded(picture(), "AVIF"), True),
        lambda: (".JPG", jpeg, True),
    )


def write_odd_ones(folder):
    """What is no regular file; name -> whether it can be captioned."""
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "memory.png").symlink_to("/proc/self/mem")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "round").symlink_to(folder, target_is_directory=True)
    (folder / "closed.png").write_bytes(encoded(picture(), "PNG"))
    (folder / "closed.png").chmod(0)
    picture(60, 60).save(folder / "good.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (folder / "link.png").symlink_to(folder / "good.jpg")
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9 \xff.png")
    picture().save(odd)
    (folder / "new\nline <|image_pad|> ${x} %s.png").write_bytes(encoded(picture(), "PNG"))
    states = {"loop.jpg": False, "dangling.jpg": False, "memory.png": False, "pipe.png": False}
    good = ["good.jpg", "link.png", "caf\udce9 \udcff.png", "new\nline <|image_pad|> ${x} %s.png"]
    return states | dict.fromkeys(good, True) | {"closed.png": os.geteuid() == 0}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder of 300 such files and good ones; name -> whether it can be captioned, if known."""
    folder = tmp_path_factory.mktemp("hostile") / "photos"
    folder.mkdir()
    generator, expected = random.Random(0), write_odd_ones(folder := folder)
    makers = list(kinds(generator))
    for index in range(300 - len(expected)):
        suffix, content, good = makers[index % len(makers)]()
        name = f"{index:03}{suffix}"
        (folder / name).write_bytes(content)
        expected[name] = good
    captions.write_pictures(folder / "good", GOOD)
    return folder, expected


@pytest.fixture(scope="module")
def result(hostile, tmp_path_factory):
    """Exit code, rows by file name, and the log."""
    folder, _ = hostile
    model = captions.write_model(tmp_path_factory.mktemp("model") / "tiny", ends=0)
    keys = {"workers": 2, "max_new_tokens": 2, "max_pixels": 6272, "batch_size": 16}
    code = captions.caption(
        model, folder, text_naming="full", outputs=["txt", "jsonl", "csv"], **keys
    )
    found = captions.rows(folder / "_captions")
    return code, {row["image"].removeprefix(f"{folder}/"): row for row in found}


def test_every_file_ends_in_one_named_state(hostile, result):
    _, expected = hostile
    code, rows = result
    assert code == 1
    assert len(rows) == 300 + GOOD
    for name, good in expected.items():
        row = rows[printable(name)]
        assert row["state"] in ("done", "cut", "looped", "failed")
        assert (row["state"] == "failed") == bool(row["reason"])
        if good is not None:
            assert (row["state"] != "failed") == good, row


def test_the_good_ones_are_captioned(hostile, result):
    folder, _ = hostile
    _, rows = result
    good = [row for name, row in rows.items() if name.startswith("good/")]
    assert len(good) == GOOD
    assert all(row["caption"] for row in good)
    assert all((folder / "good" / f"picture {k:03}.png.txt").is_file() for k in range(GOOD))


def test_a_name_that_is_no_text_has_its_caption_beside_it(hostile, result):
    folder, _ = hostile
    text = os.fsencode(folder) + b"/caf\xe9 \xff.png.txt"
    row = result[1][printable("caf\udce9 \udcff.png")]
    assert open(text, encoding="utf-8").read().strip() == row["caption"]  # noqa: SIM115


def test_reasons_tell_them_apart(result):
    reasons = {name: row["reason"] for name, row in result[1].items()}
    assert "no such file" in reasons["loop.jpg"]
    assert "no such file" in reasons["pipe.png"]
    assert "empty" in reasons["008.jpg"]
    assert "200 times" in reasons["018.png"]
    assert "pixel" in reasons["023.png"]


def test_the_review_page_shows_them_all(hostile, result):
    page = (hostile[0] / "_captions" / "review.html").read_text("utf-8")
    assert page.count("<article ") == 300 + GOOD
    assert page.count("data:image/jpeg") > GOOD


def test_texts_that_are_no_paths_end_in_a_state(tmp_path):
    """In a list, in a table, and as an argument, which is refused."""
    texts = ["a\0b.png", "half \ud83d.png", "~nobody-of-that-name/a.png", "/", "x" * 300 + ".png"]
    model = captions.write_model(tmp_path / "tiny", ends=0)
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps({"image": text}) + "\n" for text in texts))
    listed = tmp_path / "list.txt"
    listed.write_bytes("\n".join(texts[:1] + texts[2:]).encode())
    for path in (table, listed):
        assert captions.caption(model, path, outputs=["txt", "jsonl"]) == 1
        rows = captions.rows(tmp_path / f"{path.stem}_captions")
        assert [row["state"] for row in rows] == ["failed"] * len(rows)
        assert len(rows) == len(texts) - (path == listed)
    for text in texts[:3] + texts[4:]:
        assert captions.caption(model, [text]) == 2
