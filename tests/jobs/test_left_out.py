"""What is left out of folders is left out for a reason, and counted aloud."""

import contextlib
import importlib.util
import logging
import os

import pytest
from PIL import Image

from torchtune_qwen25vl.jobs import find_items
from torchtune_qwen25vl.media import _folders, image_size, load_image

TAKEN = ["a.jpg", "b.PNG", "in/c.webp", "in/e-depth.png", "in/drafts/d.png"]
LEFT_OUT = {
    "hidden": ["._a.jpg", ".b.png", "@eaDir", ".ipynb_checkpoints", "in/.thumbnails"],
    "masks (-masklabel)": ["a-masklabel.png", "in/c-masklabel.PNG"],
    ".heic (install the extra heic)": ["f.heic", "in/g.HEIC"],
    ".jxl (install the extra jxl)": ["h.jxl"],
    ".md": ["notes.md"],
    "without a suffix": ["README"],
}


@pytest.fixture
def folder(tmp_path, caplog, monkeypatch):
    """Images, and everything else that lies among them; no extra is installed."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(_folders, "LACKING", {".heic": "heic", ".jxl": "jxl"})
    inside = ["@eaDir/a.jpg", ".ipynb_checkpoints/b.png", "in/.thumbnails/c.jpg"]
    files = [*TAKEN, "a.txt", *inside, *(name for names in LEFT_OUT.values() for name in names)]
    for name in files:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(b"")
    return tmp_path / "photos"


def find(path, root, **options):
    found = find_items([str(path)], **options)
    return [str(item.path.relative_to(root)) for item in found]


def test_what_is_left_out_is_counted(folder, caplog):
    assert find(folder, folder) == TAKEN
    counts = (f"{len(names)} {reason}" for reason, names in LEFT_OUT.items())
    (said,) = caplog.messages
    assert sorted(said.removeprefix("left out of folders: ").split(", ")) == sorted(counts)


def test_nothing_is_said_where_nothing_is_left_out(folder, caplog):
    find(folder / "in" / "drafts", folder)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("exclude", "gone"),
    [
        (["*-depth.png"], ["in/e-depth.png"]),
        (["drafts"], ["in/drafts/d.png"]),
        (["in/*"], [name for name in TAKEN if name.startswith("in/")]),
        (["*.webp", "a.jpg"], ["in/c.webp", "a.jpg"]),
        (["*.jp"], []),
    ],
)
def test_patterns_are_left_out_and_counted(folder, caplog, exclude, gone):
    assert find(folder, folder, exclude=exclude) == [name for name in TAKEN if name not in gone]
    assert ("excluded" in caplog.text) == bool(gone)
    by_pattern = find(folder / "**" / "*", folder, exclude=exclude)
    assert sorted(by_pattern) == sorted(name for name in TAKEN if name not in gone)


def test_what_is_named_itself_is_taken(folder):
    """Hidden or not, with whatever suffix: the image is what was asked for."""
    for name in ("._a.jpg", "f.heic", "a-masklabel.png"):
        assert find(folder / name, folder) == [name]
    assert find(folder / "@eaDir", folder) == ["@eaDir/a.jpg"]


def test_results_of_a_job_are_its_own(folder, caplog):
    for name in ("journal-0.jsonl", "captions.jsonl", "lock", "review.html"):
        (folder / "in" / "drafts" / name).write_bytes(b"")
    assert find(folder / "in" / "drafts", folder) == ["in/drafts/d.png"]
    assert not caplog.messages


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "ppm", "pgm", "tga", "JPE"])
def test_images_of_every_suffix_are_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    kind = {"pgm": "ppm", "ppm": "ppm", "tga": "tga"}.get(suffix, "jpeg")
    Image.new("RGB", (40, 30), "red").save(path, kind)
    assert find(tmp_path, tmp_path) == [path.name]
    assert image_size(path) == load_image(path).size == (40, 30)


@pytest.mark.parametrize(
    ("suffix", "plugin", "kind"), [("heic", "pillow_heif", "HEIF"), ("jxl", "pillow_jxl", "JXL")]
)
def test_images_of_a_plugin(tmp_path, suffix, plugin, kind):
    """With the extra they are read, without it they say what is missing."""
    path = tmp_path / f"a.{suffix}"
    if importlib.util.find_spec(plugin) is None:
        path.write_bytes(b"of a kind that Pillow does not know")
        with pytest.raises(ValueError, match=rf"torchtune-qwen25vl\[{suffix}\]"):
            load_image(path)
        return
    with contextlib.suppress(ValueError):
        load_image(b"nothing")  # the plugins are registered
    Image.new("RGB", (40, 30), "red").save(path, kind)
    assert find(tmp_path, tmp_path) == [path.name]
    assert image_size(path) == load_image(path).size == (40, 30)


def test_images_without_a_suffix_are_read(folder, caplog):
    Image.new("RGB", (40, 30)).save(folder / "IMG 0001", "png")
    os.mkfifo(folder / "pipe")
    assert find(folder, folder) == ["IMG 0001", *TAKEN]
    assert "2 without a suffix" in caplog.text
