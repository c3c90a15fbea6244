"""Names with wildcards in them, texts that are no paths, lists and tables of other programs."""

import json
import os

import captions
import pytest

from torchtune_qwen25vl.jobs import as_path, find_items, read_settings

NO_PATHS = ["a\0b.png", "half \ud83d of one.png", "~nobody-of-that-name/a.png", "/", "  ", ""]
ODD = ["x" * 300 + ".png", "http://example.com/a.png", "café/../a.png", "-", "data:,x"]


def find(*inputs, **options):
    return find_items(list(map(str, inputs)), **options)


@pytest.fixture
def wild(tmp_path):
    """A folder whose name looks like a pattern, beside one that the pattern would find."""
    for name in ("photos [1] *?", "photos 1 x"):
        captions.write_pictures(tmp_path / name / "in [a]", 1)
    return tmp_path / "photos [1] *?"


def test_folders_with_wildcards_in_their_names(wild):
    inside = wild / "in [a]" / "picture 000.png"
    for given in (wild, inside, wild / "**", wild / "in [a]" / "*.png", wild / "*" / "*.png"):
        assert [item.path for item in find(given)] == [inside], given
    assert find(wild / "*" / "*.png")[0].root == wild
    assert len(find(wild.parent / "photos [12] *" / "*" / "*")) == 1  # the other one
    for given in (wild, wild / "**"):
        settings = read_settings(
            captions.config(wild, [given]), captions.recipe.captioning.Settings
        )
        assert settings.folder == wild / "_captions"


@pytest.mark.parametrize("text", NO_PATHS[:3] + NO_PATHS[4:])
def test_texts_that_are_no_paths(text):
    with pytest.raises(ValueError, match="is no path"):
        as_path(text)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_every_row_ends_as_an_item(tmp_path, suffix):
    captions.write_pictures(tmp_path, 1)
    texts = ["picture 000.png", *NO_PATHS, *ODD]
    path = tmp_path / f"table{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"image": text}) + "\n" for text in texts))
    else:
        texts = [text for text in texts if text.strip() and "\ud83d" not in text]
        path.write_bytes("\n".join(texts).encode())
    items = find(path)
    assert len(items) == len(texts)
    assert len({item.name for item in items}) == len(texts)
    assert items[0].path == tmp_path / "picture 000.png"
    refused = sum(bool(item.problem) for item in items)
    assert refused == sum(text in NO_PATHS for text in texts)


@pytest.mark.parametrize("first", [None, 5, True, 1.5, ["a.png"]])
def test_a_row_without_a_path_leaves_the_paths_of_others(tmp_path, first):
    """What the first row holds says nothing about where the other images lie."""
    (tmp_path / "t.json").write_text(json.dumps([{"image": first}, {"image": "in/b.png"}]))
    bad, good = find(tmp_path / "t.json")
    assert bad.problem
    assert (good.path, good.problem) == (tmp_path / "in" / "b.png", "")


def test_relative_paths_that_datasets_writes_start_from_the_table(tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    rows = [{"bytes": None, "path": "in/a.png"}, {"path": "in/b.png"}, "in/c.png"]
    lines = "".join(json.dumps({"image": row}) + "\n" for row in rows)
    (tmp_path / "t" / "t.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    items = find("t/t.jsonl")
    monkeypatch.chdir("/")
    assert [item.read() for item in items] == [str(tmp_path / f"t/in/{n}.png") for n in "abc"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_lists_of_other_programs(tmp_path, encoding):
    pictures = captions.write_pictures(tmp_path, 2)
    (pictures / "picture 000.png").rename(pictures / "café.png")
    path = tmp_path / "LIST.TXT"
    path.write_bytes("café.png\r\npicture 001.png\r\n".encode(encoding))
    assert [item.path.name for item in find(path)] == ["café.png", "picture 001.png"]


def test_a_list_may_still_hold_any_bytes(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    (item,) = find(tmp_path / "list.txt")
    assert os.fsencode(item.name).endswith(b"/caf\xe9.png")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sixteen.csv", "image,caption\na.png,é\n".encode("utf-16"), "cannot be read as a table"),
        ("western.csv", "image,caption\na.png,é\n".encode("cp1252"), "cannot be read as a table"),
        ("semicolons.csv", b"image;caption\na.png;x\n", r"no column 'image'.*\['image;caption'\]"),
        ("other.jsonl", b'{"file": "a.png"}\n', r"no column 'image', its columns are \['file'\]"),
        ("cut.json", b'[{"image"', "not a JSON file"),
        ("list.txt", b"\xff\xfea\0b", "begins as UTF-16 and is not"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        find(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("A.CSV", "image,tags\na.png,x\n"),
        ("A.TSV", "image\ttags\na.png\tx\n"),
        ("A.JSONL", '{"image": "a.png", "tags": "x"}\n'),
        ("A.JSON", '[{"image": "a.png", "tags": ["x"]}]'),
    ],
)
def test_suffixes_in_capitals(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (item,) = find(tmp_path / name, text_columns={"tags": "tags"})
    assert (item.path, item.texts) == (tmp_path / "a.png", {"tags": "x"})
