"""Inputs to items, and items to batches."""

import csv
import json
import os

import captions
import datasets
import pytest

from torchtune_qwen25vl.jobs import find_items, plan_batches
from torchtune_qwen25vl.jobs._images import tokens_of
from torchtune_qwen25vl.media import load_image

COLUMNS = {"tags": "tags", "caption": "caption"}


def find(*inputs, **options):
    return find_items(list(map(str, inputs)), text_columns=COLUMNS, **options)


def names(items, root):
    return [os.path.relpath(item.name, root) for item in items]


@pytest.fixture
def tree(tmp_path):
    """A folder of files that look like images, in folders, with other things between them."""
    for name in ("b.JPG", "a.png", "a.txt", "notes.md", "z/c.webp", "m/n/d.avif", "m/e.tiff"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "tree"


def test_folders_in_order_of_names(tree):
    expected = ["a.png", "b.JPG", "m/e.tiff", "m/n/d.avif", "z/c.webp"]
    assert names(find(tree), tree) == expected
    assert names(find(tree, recursive=False), tree) == expected[:2]


def test_inputs_in_their_order_and_nothing_twice(tree):
    found = find(tree / "z", tree / "b.JPG", tree)
    assert names(found, tree) == ["z/c.webp", "b.JPG", "a.png", "m/e.tiff", "m/n/d.avif"]


def test_patterns(tree):
    assert names(find(tree / "*.png"), tree) == ["a.png"]
    assert names(find(tree / "**" / "*"), tree) == names(find(tree / "**"), tree)
    assert find(tree / "m" / "**")[0].root == tree / "m"
    (tree / "odd [1].png").write_bytes(b"")
    assert names(find(tree / "odd [1].png"), tree) == ["odd [1].png"]


def test_links_to_folders_are_followed_and_circles_end(tree, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f.png").write_bytes(b"")
    (tree / "link").symlink_to(tmp_path / "outside")
    (tree / "circle").symlink_to(tree)
    assert names(find(tree), tree).count("link/f.png") == 1
    assert len(find(tree)) == 6


def test_lists_are_relative_to_themselves_and_may_hold_any_bytes(tree):
    path = tree / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfz/c.webp\r\n\n  a.png \n/abs/x.png\ncaf\xe9.png")
    found = find(path)
    assert names(found[:2], tree) == ["z/c.webp", "a.png"]
    assert found[2].name == "/abs/x.png"
    assert os.fsencode(found[3].name).endswith(b"/caf\xe9.png")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_tables(tree, suffix):
    rows = [{"image": "a.png", "tags": "x, y", "caption": "Old."}, {"image": "z/c.webp"}]
    path = tree / f"table{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["image", "tags", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = map(json.dumps, rows)
        path.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]")
    found = find(path)
    assert names(found, tree) == ["a.png", "z/c.webp"]
    assert [(item.texts["tags"], item.texts["caption"]) for item in found] == [
        ("x, y", "Old."),
        ("", ""),
    ]


def test_rows_that_name_no_image_are_items_with_a_problem(tree):
    path = tree / "table.jsonl"
    path.write_text('{"image": "a.png"}\nnot json\n{"tags": ["x"]}\n{"image": 3}\n')
    found = find(path)
    assert [bool(item.problem) for item in found] == [False, True, True, True]
    assert found[1].name == f"{path}#1"


def test_datasets_on_disk_hold_their_images(tmp_path):
    pictures = captions.write_pictures(tmp_path / "pictures", 3)
    files = sorted(pictures.iterdir())
    features = datasets.Features(
        {"image": datasets.Image(), "tags": datasets.List(datasets.Value("string"))}
    )
    rows = {"image": [str(f) for f in files], "tags": [["a", "b"], [], None]}
    held = datasets.Dataset.from_dict(rows, features=features)
    held = held.map(lambda row: row)  # bytes, not paths, once it is saved
    held.save_to_disk(str(tmp_path / "saved"))
    found = find(tmp_path / "saved")
    assert [item.name for item in found] == [f"{tmp_path}/saved#{k}" for k in range(3)]
    assert [item.texts["tags"] for item in found] == ["a, b", "", ""]
    for item, file in zip(found, files, strict=True):
        assert load_image(item.read()).tobytes() == load_image(file).tobytes()
        limits = {"min_pixels": 3136, "max_pixels": 12544}
        assert tokens_of(item.read(), **limits) == tokens_of(file, **limits) > 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["/nowhere"], "that exists; /nowhere does not"),
        (["/nowhere/*.png"], "no images"),
        ([], "no images"),
    ],
)
def test_no_images_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        find(*inputs)


def test_batches_are_of_near_equal_images_the_smallest_then_the_largest():
    tokens = {"a": 10, "b": 50, "c": 11, "d": 49, "e": 50}
    batches = [["a"], ["b", "e"], ["d", "c"]]
    assert plan_batches(tokens, batch_size=2, batch_tokens=10**6, text_tokens=5) == batches
    assert plan_batches(tokens, batch_size=9, batch_tokens=110, text_tokens=5) == batches
    alone = [[name] for name in "abedc"]
    assert plan_batches(tokens, batch_size=9, batch_tokens=1, text_tokens=5) == alone
    assert plan_batches({}, batch_size=9, batch_tokens=1, text_tokens=5) == []
