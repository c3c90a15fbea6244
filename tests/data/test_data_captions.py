"""Pictures with captions: each caption a question and its answer."""

import json

import datasets
import pytest

from tests.data_samples import messages_of, save_pictures, seen, transform, write_json, write_jsonl
from torchtune_qwen25vl.data import caption_dataset, caption_folder_dataset, coco_caption_dataset

ASKED = "Describe this image."


@pytest.fixture
def shown(tmp_path):
    return [seen(image) for image in save_pictures(tmp_path, "a.png", "sub/b.png")]


def captioned(image, caption, prompt=ASKED):
    return [("user", [image, prompt], False), ("assistant", [caption], True)]


def refused(dataset, index, match):
    with pytest.raises(ValueError, match=match) as error:
        dataset[index]
    assert f"{dataset.source}, row {index}: " in str(error.value)


def test_tables(tmp_path, shown):
    for name, text in [
        ("c.csv", '\ufeffimage,caption\na.png,"One, two"\nsub/b.png," 007\nlines "\n'),
        ("c.tsv", 'image\tcaption\na.png\tOne, two\nsub/b.png\t" 007\nlines "\n'),
    ]:
        (tmp_path / name).write_text(text, "utf-8")
        dataset = caption_dataset(transform(), source=str(tmp_path / name))
        assert len(dataset) == 2
        assert messages_of(dataset) == captioned(shown[0], "One, two")
        assert messages_of(dataset, 1) == captioned(shown[1], " 007\nlines ")


def test_other_columns_and_prompts(tmp_path, shown):
    (tmp_path / "c.csv").write_text("text,file\nNone,a.png\n")
    dataset = caption_dataset(
        transform(),
        source=str(tmp_path / "c.csv"),
        image_column="file",
        caption_column="text",
        prompt="What?",
    )
    assert messages_of(dataset) == captioned(shown[0], "None", "What?")


def test_bad_lines_of_a_table(tmp_path, shown):
    (tmp_path / "c.csv").write_text("image,caption\na.png,one, two\na.png\na.png,\n\n")
    dataset = caption_dataset(transform(), source=str(tmp_path / "c.csv"))
    assert len(dataset) == 3
    refused(dataset, 0, r"more fields than the header names: \[' two'\]")
    refused(dataset, 1, "no 'caption'")
    refused(dataset, 2, "turn 1 is an empty answer")
    (tmp_path / "c.csv").write_text('image,caption\na.png,"one')
    with pytest.raises(ValueError, match=r"c\.csv, after line 1: unexpected end"):
        caption_dataset(transform(), source=str(tmp_path / "c.csv"))


def test_each_of_several_captions_is_a_sample(tmp_path, shown):
    rows = [
        {"image": "a.png", "caption": ["one", "two"]},
        {"image": "sub/b.png", "caption": "three"},
        {"image": "a.png", "caption": []},
        {"image": "a.png", "caption": ["four", 5]},
    ]
    for source in (
        write_json(tmp_path / "c.json", *rows),
        write_jsonl(tmp_path / "c.jsonl", *rows),
    ):
        dataset = caption_dataset(transform(), source=source)
        assert len(dataset) == 6
        assert [messages_of(dataset, k) for k in (0, 1, 2, 4)] == [
            captioned(shown[0], "one"),
            captioned(shown[0], "two"),
            captioned(shown[1], "three"),
            captioned(shown[0], "four"),
        ]
        refused(dataset, 3, "no 'caption'")
        refused(dataset, 5, "a caption is a text, got int 5")


def test_a_damaged_line_is_that_rows_error(tmp_path, shown):
    (tmp_path / "c.jsonl").write_text('{"image": "a.png", "caption": ["one", "two"]}\n{"image": \n')
    dataset = caption_dataset(transform(), source=str(tmp_path / "c.jsonl"))
    assert len(dataset) == 3
    assert messages_of(dataset, 1) == captioned(shown[0], "two")
    refused(dataset, 2, "the row is not JSON")


def test_captions_of_an_image_column(tmp_path, shown):
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "a.png")] * 2, "caption": [["one", "two"], ["three"]]}
    ).cast_column("image", datasets.Image())
    rows.select([1, 0]).save_to_disk(tmp_path / "rows")
    dataset = caption_dataset(transform(), source=str(tmp_path / "rows"))
    assert [messages_of(dataset, k)[1][1] for k in range(3)] == [["three"], ["one"], ["two"]]
    assert messages_of(dataset)[0][1][0] == shown[0]


def test_coco(tmp_path, shown):
    content = {
        "images": [{"id": 7, "file_name": "sub/b.png"}, {"id": 3, "file_name": "a.png"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": "one"},
            {"id": 2, "image_id": 7, "caption": "two"},
            {"id": 3, "image_id": 3, "caption": "three\n"},
        ],
    }
    (tmp_path / "notes").mkdir()
    path = tmp_path / "notes" / "captions_val.json"
    path.write_text(json.dumps(content))
    dataset = coco_caption_dataset(transform(), source=str(path), media_root=str(tmp_path))
    assert [messages_of(dataset, k) for k in range(3)] == [
        captioned(shown[0], "one"),
        captioned(shown[1], "two"),
        captioned(shown[0], "three\n"),
    ]
    content["annotations"].append({"id": 9, "image_id": 4, "caption": "lost"})
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"annotations \[9\] belong to none"):
        coco_caption_dataset(transform(), source=str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="'images' and 'annotations'"):
        coco_caption_dataset(transform(), source=str(path))


def test_a_folder_with_sidecars(tmp_path, shown, monkeypatch):
    save_pictures(tmp_path, "c.webp", ".hidden.png")
    (tmp_path / "a.txt").write_text("\ufeff A cat. \n\n", "utf-8")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "sub" / "b.txt").write_text("Eine T\u00fcr", "utf-8")
    dataset = caption_folder_dataset(transform(), source=str(tmp_path), prompt="What?")
    assert len(dataset) == 3
    assert messages_of(dataset) == captioned(shown[0], " A cat. ", "What?")
    refused(dataset, 1, "codec can't decode byte 0xe9")
    assert messages_of(dataset, 2) == captioned(shown[1], "Eine T\u00fcr", "What?")
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(tmp_path.parent)
        relative = caption_folder_dataset(transform(), source=tmp_path.name, prompt="What?")
        assert messages_of(relative) == messages_of(dataset)
    (tmp_path / "a.png.txt").write_text("Of this one.")  # a.jpg may have another
    assert messages_of(dataset) == captioned(shown[0], "Of this one.", "What?")
    (tmp_path / "c.txt").unlink()
    refused(dataset, 1, r"c\.webp has no c\.txt beside it")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        caption_folder_dataset(transform(), source=str(tmp_path / "empty"))
