"""Names of text files, and the bytes in them."""

import pytest

from torchtune_qwen25vl.captioning._texts import TextFiles
from torchtune_qwen25vl.jobs import Item

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "stem", "full"),
    [
        ("a.jpg", "a.txt", "a.jpg.txt"),
        ("a.b.jpg", "a.b.txt", "a.b.jpg.txt"),
        ("v1.0 final.PNG", "v1.0 final.txt", "v1.0 final.PNG.txt"),
        ("a..webp", "a..txt", "a..webp.txt"),
    ],
)
def test_a_text_file_has_the_whole_name_but_the_suffix(tmp_path, name, stem, full):
    item = Item(name, tmp_path / "photos" / "in.it" / name, tmp_path / "photos")
    mirror = tmp_path / "mirror"
    for naming, expected in (("stem", stem), ("full", full)):
        assert TextFiles(naming=naming).path(item) == tmp_path / "photos" / "in.it" / expected
        assert TextFiles(mirror, naming).path(item) == mirror / "in.it" / expected


@pytest.mark.parametrize("existing", ["append", "prepend"])
def test_a_byte_order_mark_is_no_part_of_a_caption(run, photos, existing):
    """As Windows editors write it; in the middle of a caption it would be a token of its own."""
    text = photos / "picture 001.txt"
    for mark in (BOM, b""):
        text.write_bytes(mark + "Über mich.\r\n".encode())
        assert run(existing=existing, restart=True) == 0
        written = text.read_bytes()
        assert BOM not in written
        assert written.decode().startswith("Über mich") == (existing == "append")
        for path in photos.glob("*.txt"):
            path.unlink()
