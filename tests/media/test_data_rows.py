"""Stored rows: every kind of storage, damage, and what is dropped on the way."""

import json
import pickle

import datasets
import pytest

from torchtune_qwen25vl.media._open import open_rows
from torchtune_qwen25vl.media._rows import ArrowRows, JsonRows, json_texts


def everything(rows):
    return [rows[index] for index in range(len(rows))]


def test_json_keeps_rows_of_any_shape(tmp_path):
    rows = [
        {"image": "a.jpg", "n": None},
        {"image": ["a.jpg", "b.jpg"], "text": "line\u2028separator \u00e9 \ud800"},
        {"content": [{"type": "text"}, "mixed", 3]},
    ]
    (tmp_path / "r.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "r.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\r\n")
    (tmp_path / "bom.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), "utf-8")
    for name in ("r.json", "r.jsonl", "bom.jsonl"):
        opened = open_rows(str(tmp_path / name))
        assert everything(opened) == rows
        assert everything(pickle.loads(pickle.dumps(opened))) == rows
        assert opened.column("image") == ["a.jpg", ["a.jpg", "b.jpg"], None]
    assert len(JsonRows([])) == 0


def test_a_damaged_line_spares_its_neighbours(tmp_path):
    lines = [b'{"a": 1}', b'{"a": ', b'[{"a": 2}', b"3", b'{"a": "\xff"}', b'{"a": 4}']
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines))
    rows = open_rows(str(tmp_path / "r.jsonl"))
    assert (rows[0], rows[5]) == ({"a": 1}, {"a": 4})
    for index, match in enumerate(["not JSON", "not JSON", "not a JSON object", "not JSON"], 1):
        with pytest.raises(ValueError, match=match):
            rows[index]
    assert rows.column("a") == [1, None, None, None, None, 4]
    assert len({rows.digest(index) for index in range(6)}) == 6


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("r.json", '{"a": 1}\n{"a": 2}', "jsonl for one row a line"),
        ("r.json", '{"a": 1}', "holds one dict, not an array of rows"),
    ],
)
def test_files_damaged_as_a_whole(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        open_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.bz2", "rows.parquet.gz", "rows"])
def test_files_of_other_kinds_are_not_looked_for_on_the_hub(tmp_path, name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"end in \.json, \.jsonl.*got .*{name}; convert it"):
        open_rows(str(tmp_path / name))


def test_suffixes_in_capitals_are_read(tmp_path):
    (tmp_path / "ROWS.JSON").write_text('[{"a": 1}]')
    assert everything(open_rows(str(tmp_path / "ROWS.JSON"))) == [{"a": 1}]


@pytest.mark.parametrize("source", ["./gone", "/gone/rows", "../gone", "a/b/gone", "~/gone", "a/"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=f"{source}: no such file or folder"):
        open_rows(source)


def test_folders_whose_names_are_patterns(tmp_path, monkeypatch):
    """`datasets` takes data_files for patterns, and so the working directory before them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "a [1]*"
    folder.mkdir()
    monkeypatch.chdir(folder)
    datasets.Dataset.from_dict({"a": [1]}).to_parquet("r.parquet")
    for source in ("r.parquet", str(folder / "r.parquet")):
        assert everything(open_rows(source)) == [{"a": 1}]
    for files in ("r.parquet", ["r.parquet"], {"train": str(folder / "r.parquet")}):
        for options in ({}, {"streaming": True}):
            rows = open_rows("parquet", data_files=files, **options)
            assert [rows[0], len(rows)] == [{"a": 1}, 1]


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
@pytest.mark.parametrize("files", ["gone/*.jsonl", ["gone.jsonl"], {"train": "gone.jsonl"}])
def test_data_files_that_are_not_there_are_refused(files, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"json: data_files 'gone.*jsonl' finds no file"):
        open_rows("json", data_files=files, **options)


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_an_option_that_a_builder_does_not_have_is_named(options, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"^json: .*'streamin'; mend that name, or leave it out$"):
        open_rows("json", data_files=str(tmp_path / "r.jsonl"), streamin=True, **options)


def test_sources_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_rows(str(tmp_path / "gone.jsonl"))
    (tmp_path / "r.jsonl").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"\['meda_root'\] mean nothing for a file"):
        open_rows(str(tmp_path / "r.jsonl"), meda_root="x")
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})})
    rows.save_to_disk(tmp_path / "saved")
    assert everything(open_rows(str(tmp_path / "saved"))) == [{"a": 1}]
    with pytest.raises(ValueError, match=r"\['data_files'\] mean nothing for saved splits"):
        open_rows(str(tmp_path / "saved"), data_files="x")
    for source in ("r.jsonl", "whole"):
        rows["train"].save_to_disk(tmp_path / "whole")
        assert everything(open_rows(str(tmp_path / source), split="train")) == [{"a": 1}]
        with pytest.raises(ValueError, match=r"is one split, called train, got 'test'"):
            open_rows(str(tmp_path / source), split="test")
    with pytest.raises(ValueError, match=r"no split 'test', it holds \['train'\]"):
        open_rows(str(tmp_path / "saved"), split="test")


def test_arrow_rows_lose_their_padding_and_keep_media_undecoded():
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "parts": datasets.List({"type": datasets.Value("string"), "more": datasets.Image()}),
        }
    )
    parts = [
        [{"type": "image", "more": {"bytes": b"x", "path": None}}, {"type": "t", "more": None}]
    ]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"not an image", "path": "a.png"}], "parts": parts}, features=features
    )
    rows = ArrowRows(table)
    assert rows[0] == {
        "image": {"bytes": b"not an image", "path": "a.png"},
        "parts": [{"type": "image", "more": {"bytes": b"x"}}, {"type": "t"}],
    }
    assert everything(pickle.loads(pickle.dumps(rows))) == everything(rows)
    assert rows.column("gone") == [None]
    assert rows.digest(0) == ArrowRows(table).digest(0)


def test_false_and_zero_are_no_padding():
    rows = [{"loss": False, "weight": 0, "text": ""}, {"loss": True, "weight": None, "text": "a"}]
    arrow = ArrowRows(datasets.Dataset.from_list([{"messages": rows}]))
    assert arrow[0]["messages"] == [rows[0], {"loss": True, "text": "a"}]


def test_columns_of_json_are_read(tmp_path):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no Json feature")
    table = datasets.Dataset.from_dict(
        {"a": ['{"b": [1, "c"]}']}, features=datasets.Features({"a": datasets.Json()})
    )
    assert ArrowRows(table)[0] == {"a": {"b": [1, "c"]}}


def test_rows_made_in_python_are_flattened():
    assert everything(JsonRows(json_texts([[{"a": 1}, {"a": 2}], {"a": 3}]))) == [
        {"a": 1},
        {"a": 2},
        {"a": 3},
    ]
