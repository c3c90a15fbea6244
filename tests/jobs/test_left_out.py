"""What is left out of folders is left out for a reason, and counted aloud."""

import logging

import pytest

from torchtune_qwen25vl.jobs import find_items

TAKEN = ["a.jpg", "b.PNG", "in/c.webp", "in/e-depth.png", "in/drafts/d.png"]
LEFT_OUT = {
    "hidden": ["._a.jpg", ".b.png", "@eaDir", ".ipynb_checkpoints", "in/.thumbnails"],
    "masks (-masklabel)": ["a-masklabel.png", "in/c-masklabel.PNG"],
    ".heic": ["f.heic", "in/g.HEIC"],
    ".md": ["notes.md"],
    "without a suffix": ["README"],
}


@pytest.fixture
def folder(tmp_path, caplog):
    """Images, and everything else that lies among them."""
    caplog.set_level(logging.INFO)
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
