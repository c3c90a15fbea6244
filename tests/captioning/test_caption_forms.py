"""The form of captions and the places they go to."""

import csv
import json
import os
import stat
from pathlib import Path

import captions
import datasets
import pytest

from torchtune_qwen25vl.captioning._prompts import Wording


@pytest.mark.parametrize(
    ("existing", "policy", "expected"),
    [
        ("Mine.", "append", "ohwx, Mine.; new"),
        ("ohwx, Mine.", "append", "ohwx, Mine.; new"),
        ("Mine.", "prepend", "ohwx, new; Mine."),
        ("ohwx, Mine.", "prepend", "ohwx, new; Mine."),
        ("", "append", "ohwx, new"),
        ("Mine.", "overwrite", "ohwx, new"),
    ],
)
def test_the_trigger_leads_whatever_is_joined(existing, policy, expected):
    wording = Wording("?", trigger="ohwx", separator="; ")
    assert wording.joined(existing, wording.around("new"), policy) == expected


def test_one_line_or_as_it_is():
    answer = "First.\n\n- second\r\n  third "
    assert Wording("?").around(answer) == answer
    assert Wording("?", newlines="space").around(answer) == "First. - second third"


def test_texts_of_another_suffix(run, photos, no_model):
    assert run() == 0
    before = captions.texts(photos)
    no_model()
    assert run(text_suffix=".caption") == 0
    found = {path.name: path.read_text() for path in photos.glob("*.caption")}
    assert found == {name.replace(".txt", ".caption"): text for name, text in before.items()}
    for wrong in (".png", "caption", "", "/x", ".heic"):
        assert run(text_suffix=wrong) == 2


def test_written_files_are_readable_by_all(run, photos):
    before = os.umask(0o022)
    try:
        run()
    finally:
        os.umask(before)
    written = [*photos.glob("*.txt"), *(photos / "_captions").iterdir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in written if path.is_file()} == {0o644}


def test_images_that_a_shell_lists_have_one_output_folder(run, photos):
    assert run(*sorted(photos.glob("*.png"))) == 0
    assert len(captions.rows(photos / "_captions")) == 4


def test_other_columns_of_a_table_are_kept(run, photos, tmp_path):
    table = tmp_path / "table.jsonl"
    rows = [
        {"image": f"photos/picture 00{i}.png", "id": i, "state": "theirs", "tags": ["a", "b"]}
        for i in range(2)
    ]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert run(table, outputs=["jsonl", "csv"], output_dir=str(tmp_path / "out")) == 0
    found = captions.rows(tmp_path / "out")
    assert [(row["id"], row["tags"]) for row in found] == [(0, ["a", "b"]), (1, ["a", "b"])]
    assert all(row["state"] != "theirs" for row in found)
    with (tmp_path / "out" / "captions.csv").open(newline="", encoding="utf-8") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["0", "1"]


def test_relative_paths_in_tables(run, photos, no_model):
    keys = {"outputs": ["jsonl", "csv"], "table_paths": "relative"}
    assert run(**keys) == 0
    found = captions.rows(photos / "_captions")
    assert found[0]["image"] == "../picture 000.png"
    no_model()
    assert run(seed=1, **keys) == 0  # another run knows these captions
    assert {row["state"] for row in captions.rows(photos / "_captions")} == {"skipped"}
    assert run(found[0]["image"] and photos / "_captions" / "captions.jsonl", **keys) == 0


def test_an_image_folder_of_datasets(run, photos, caplog):
    captions.write_pictures(photos / "inner", 1, seed=1)
    assert run(outputs=["jsonl", "metadata"]) == 0
    known = {Path(row["image"]): row["caption"] for row in captions.rows(photos / "_captions")}
    lines = (photos / "metadata.jsonl").read_text("utf-8").splitlines()
    rows = list(map(json.loads, lines))
    assert {photos / row["file_name"]: row["text"] for row in rows} == known
    assert "inner/picture 000.png" in lines[-1]
    loaded = datasets.load_dataset("imagefolder", data_dir=str(photos), split="train")
    assert sorted(loaded["text"]) == sorted(known.values())
    assert run(outputs=["metadata"]) == 0
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 1}\n')
    assert run(outputs=["metadata"]) == 2
    assert "is there and not of captions" in caplog.text
