"""Datasets as recipes use them: samples, labels, workers, and rows that are left out."""

import json
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset as Stored
from datasets import DatasetDict
from omegaconf import OmegaConf
from torch.utils.data import DataLoader
from torchtune import config
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORE
from torchtune.datasets import ConcatDataset
from training_samples import from_dataset

from parity import vocabulary
from tests.data_samples import (
    SAYINGS,
    messages_of,
    save_pictures,
    save_video,
    seen,
    transform,
    write_jsonl,
)
from torchtune_qwen25vl.data import (
    caption_dataset,
    caption_folder_dataset,
    coco_caption_dataset,
    hf_dataset,
    llava_dataset,
    openai_dataset,
    sharegpt_dataset,
    swift_dataset,
)
from torchtune_qwen25vl.data.__main__ import main
from torchtune_qwen25vl.transform._collate import padded_collate
from torchtune_qwen25vl.transform._transform import SkipSample


def talk(question, answer, **row):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**row, "conversations": said}


def talked(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def source(tmp_path):
    """Six rows: with a picture, of text, and two that are bad (2 and 4)."""
    save_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return write_jsonl(
        tmp_path / "rows.jsonl",
        talk("<image>\nWhat?", "That.", image="a.png"),
        talk("Hi", "Ho"),
        talk("<image>\nWhat?", "That.", image="cut.png"),
        talk("<image>\nAnd this?", "Also.", image="b.png"),
        talk("<image>\nWhat?", "That."),
        talk("Bye", "Bye then"),
    )


@pytest.fixture
def report(tmp_path, source, capsys):
    """What the check command says of these rows."""
    text = {
        "tokenizer": {
            "_component_": "torchtune_qwen25vl.transform._transform.Qwen25VLTransform",
            "path": str(vocabulary.small(SAYINGS) / "tokenizer.json"),
        },
        "dataset": {"_component_": "torchtune_qwen25vl.data.llava_dataset", "source": source},
    }
    OmegaConf.save(text, tmp_path / "recipe.yaml")
    arguments = ["check", str(tmp_path / "recipe.yaml"), "--num-workers=0"]
    assert main([*arguments, "--report", str(tmp_path / "report")]) == 1
    capsys.readouterr()
    return str(tmp_path / "report" / "report.json")


def test_a_sample_is_what_the_transform_makes_of_the_messages(source):
    dataset = llava_dataset(transform(), source=source)
    sample, row = dataset[0], dataset._read(dataset.rows[0])
    made = transform()(row)
    for name in ("tokens", "mask", "input_pos"):
        assert torch.equal(sample[name], made[name])
    np.testing.assert_array_equal(sample["labels"], from_dataset(made["labels"]))
    text = transform().decode(sample["tokens"].tolist(), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nThat.<|im_end|>\n"
    )
    trained = [token for token in sample["labels"] if token != IGNORE]
    assert transform().decode(trained, skip_special_tokens=False) == "That.<|im_end|>"


def test_bad_rows_raise_with_their_numbers(source):
    dataset = llava_dataset(transform(), source=source)
    assert len(dataset) == 6
    for row, match in ((2, "cut.png: cannot be"), (4, "got 1 places")):
        with pytest.raises(ValueError, match=f"rows.jsonl, row {row}: .*{match}"):
            dataset[row]
    with pytest.raises(IndexError):
        dataset[6]


SWIFT = {"images": ["a.png"], "messages": talked("<image>Where? <bbox>", "There.")}
NUMBER = [{"type": "text", "text": 5}]  # the tokenizer would take it for 5 zero bytes


@pytest.mark.parametrize(
    ("build", "row", "said"),
    [
        (swift_dataset, {**SWIFT, "objects": {"bbox": [["10", 1, 2, 3]]}}, "laid out .*TypeErr"),
        (swift_dataset, {**SWIFT, "objects": [1]}, "laid out .*AttributeError"),
        (openai_dataset, {"messages": talked(NUMBER, "Five.")}, "string, got 5 in turn 0"),
        (openai_dataset, {"messages": talked("Five?", NUMBER)}, "string, got 5 in turn 1"),
    ],
)
def test_rows_of_wrong_types_raise_with_their_numbers(build, row, said, source, tmp_path):
    dataset = build(transform(), source=write_jsonl(tmp_path / "wrong.jsonl", row))
    with pytest.raises(ValueError, match=f"wrong.jsonl, row 0: .*{said}"):
        dataset[0]


def test_whatever_fails_in_a_row_is_an_error_that_names_it(source, monkeypatch):
    dataset = llava_dataset(transform(), source=source)
    monkeypatch.setattr(dataset, "_label", lambda row: row["nothing"])
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: KeyError\('nothing'\)"):
        dataset[1]


def test_workers_read_what_one_process_reads(source, report):
    dataset = llava_dataset(transform(), source=source, skip_bad_rows=report)
    batches = {
        workers: list(DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate))
        for workers in (0, 2)
    }
    assert len(batches[0]) == 2
    for ours, theirs in zip(batches[0], batches[2], strict=True):
        for name in ("tokens", "labels", "input_pos"):
            assert torch.equal(ours[name], theirs[name])
        for name, values in ours["encoder_input"]["vision"].items():
            assert torch.equal(values, theirs["encoder_input"]["vision"][name])
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[0]["tokens"], dataset[0]["tokens"])


def collate(batch):
    return padded_collate(batch, padding_idx=transform().pad_id, ignore_idx=IGNORE)


def test_a_bad_row_ends_a_loader_with_its_name(source):
    loader = DataLoader(llava_dataset(transform(), source=source), batch_size=None, num_workers=2)
    with pytest.raises(ValueError, match=r"rows.jsonl, row 2: .*cut.png"):
        list(loader)


def test_recipes_build_datasets_by_name_and_join_them(source, tmp_path):
    rows = [{"image": "a.png", "caption": ["one", "two"]}]
    captions = write_jsonl(tmp_path / "captions.jsonl", *rows)
    sections = OmegaConf.create(
        [
            {"_component_": "torchtune_qwen25vl.data.llava_dataset", "source": source},
            {"_component_": "torchtune_qwen25vl.data.caption_dataset", "source": captions},
        ]
    )
    joined = ConcatDataset([config.instantiate(section, transform()) for section in sections])
    assert len(joined) == 8
    assert torch.equal(
        joined[7]["tokens"], caption_dataset(transform(), source=captions)[1]["tokens"]
    )
    assert llava_dataset(transform(), source=source, packed=False)
    with pytest.raises(ValueError, match="packed_collate"):
        llava_dataset(transform(), source=source, packed=True)


def test_rows_of_a_report_are_left_out(source, report):
    whole = llava_dataset(transform(), source=source)
    dataset = llava_dataset(transform(), source=source, skip_bad_rows=report)
    assert dataset.bad_rows == (2, 4)
    assert len(dataset) == 4
    for index, row in enumerate((0, 1, 3, 5)):
        assert torch.equal(dataset[index]["tokens"], whole[row]["tokens"])


def test_a_report_tells_splits_of_one_source_apart(tmp_path, capsys):
    """A set of the hub has one name, as `dataset` and as `val_dataset`."""
    rows = [{"messages": talked("Hi", said)} for said in ("Ho", "", "Ho ho")]
    splits = {"train": rows, "validation": [rows[1], rows[0], rows[0]]}
    source = str(tmp_path / "set")
    DatasetDict({name: Stored.from_list(split) for name, split in splits.items()}).save_to_disk(
        source
    )
    section = {"_component_": "torchtune_qwen25vl.data.hf_dataset", "source": source}
    text = {
        "tokenizer": {
            "_component_": "torchtune_qwen25vl.transform._transform.Qwen25VLTransform",
            "path": str(vocabulary.small(SAYINGS) / "tokenizer.json"),
        },
        "dataset": section,
        "val_dataset": {**section, "split": "validation"},
    }
    OmegaConf.save(text, tmp_path / "recipe.yaml")
    path = str(tmp_path / "report")
    assert main(["check", str(tmp_path / "recipe.yaml"), "--num-workers=0", "--report", path]) == 1
    for split, bad in (("train", (1,)), ("validation", (0,))):
        dataset = hf_dataset(
            transform(), source=source, split=split, skip_bad_rows=f"{path}/report.json"
        )
        assert dataset.bad_rows == bad


def test_a_row_that_turns_bad_later_is_an_error_again(source, report, tmp_path):
    dataset = llava_dataset(transform(), source=source, skip_bad_rows=report)
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"row 3: .*b.png: no such file"):
        dataset[2]


def test_a_report_about_other_rows_is_refused(source, report, tmp_path):
    def refused(match, **arguments):
        with pytest.raises(ValueError, match=f"{match}.*check` again"):
            llava_dataset(transform(), **{"source": source, "skip_bad_rows": report, **arguments})

    refused("names no file", skip_bad_rows=str(tmp_path / "gone.json"))
    other = write_jsonl(tmp_path / "other.jsonl", talk("Hi", "Ho"))
    refused("not about .*other.jsonl", source=other)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:5]))
    refused("has 5 rows but had 6")
    (tmp_path / "rows.jsonl").write_text("".join([*lines, lines[1]]))  # the bad ones are the same
    refused("has 7 rows but had 6")
    (tmp_path / "rows.jsonl").write_text("".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    refused("row 2: bad in .*report.json, but changed since")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    llava_dataset(transform(), source=source, skip_bad_rows=report)


def test_samples_to_skip_stay_named(tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", talk("Hi", "Ho " * 100))
    dataset = llava_dataset(transform(max_seq_len=40, over_long="skip"), source=source)
    with pytest.raises(SkipSample, match=r"row 0: .*give the dataset its report"):
        dataset[0]


def test_paths_start_beside_the_rows_or_at_media_root(tmp_path):
    save_pictures(tmp_path, "media/a.png")
    (tmp_path / "notes").mkdir()
    row = talk("<image>\nWhat?", "That.", image="a.png")
    source = write_jsonl(tmp_path / "notes" / "rows.jsonl", row)
    with pytest.raises(ValueError, match=r"notes/a.png: no such file"):
        llava_dataset(transform(), source=source)[0]
    llava_dataset(transform(), source=source, media_root=str(tmp_path / "media"))[0]


FILM = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]
WITH_PATHS = {  # a row of each format beside the builder that reads it
    llava_dataset: talk("<image>\n<video>\nWhat?", "That.", image="a.png", video="a.mp4"),
    sharegpt_dataset: talk("<image><video>?", "That.", images=["a.png"], videos=["a.mp4"]),
    swift_dataset: {
        "messages": talked("<image><video>?", "That."),
        "images": ["a.png"],
        "videos": [["a.png", "b.png"]],
    },
    openai_dataset: {"messages": talked([{"type": "image", "image": "a.png"}, *FILM], "That.")},
    hf_dataset: {
        "messages": talked([{"type": "image"}, {"type": "video"}], "That."),
        "image": "a.png",
        "video": "a.mp4",
    },
    caption_dataset: {"image": "a.png", "caption": "That."},
}


@pytest.mark.parametrize("build", WITH_PATHS)
def test_relative_sources_and_media_are_found(build, tmp_path, monkeypatch):
    save_pictures(tmp_path / "set", "a.png", "b.png")
    save_video(tmp_path / "set" / "a.mp4")
    write_jsonl(tmp_path / "set" / "rows.jsonl", WITH_PATHS[build])
    (tmp_path / "elsewhere").mkdir()
    whole = build(transform(), source=str(tmp_path / "set" / "rows.jsonl"))[0]
    monkeypatch.chdir(tmp_path)
    dataset = build(transform(), source="set/rows.jsonl")
    from_elsewhere = build(transform(), source="set/rows.jsonl", media_root="set")
    monkeypatch.chdir(tmp_path / "elsewhere")  # as a worker process may
    for sample in (dataset[0], from_elsewhere[0]):
        assert torch.equal(sample["tokens"], whole["tokens"])
        assert len(sample["encoder_input"]["vision"]["grid_thw"]) in (1, 2)


def test_captions_that_were_corrected_are_trained_on(tmp_path, monkeypatch):
    """Caption a folder, correct the texts, train: as text files and as the table of the run."""
    (image,) = save_pictures(tmp_path, "photos/a.png")
    (tmp_path / "photos" / "a.txt").write_text("corrected\n")
    write_jsonl(tmp_path / "photos" / "captions.jsonl", {"image": "a.png", "caption": "corrected"})
    notes = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "corrected"}],
    }
    (tmp_path / "photos" / "coco.json").write_text(json.dumps(notes))
    monkeypatch.chdir(tmp_path)
    datasets = [
        caption_folder_dataset(transform(), source="photos"),
        caption_dataset(transform(), source="photos/captions.jsonl"),
        coco_caption_dataset(transform(), source="photos/coco.json"),
    ]
    expected = [
        ("user", [seen(image), "Describe this image."], False),
        ("assistant", ["corrected"], True),
    ]
    for dataset in datasets:
        assert messages_of(dataset) == expected


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (llava_dataset, {"split": "test"}, "a file is one split, called train, got 'test'"),
        (caption_dataset, {"prepend_media": True}, "prepend_media means nothing here, since"),
        (openai_dataset, {"prepend_media": True}, "prepend_media means nothing here, since"),
        (coco_caption_dataset, {"split": "test"}, "is one split, called train, got test"),
        (caption_folder_dataset, {"split": "test"}, "is one split, called train, got test"),
        (caption_folder_dataset, {"media_root": "x"}, "media_root means nothing here, since"),
    ],
)
def test_options_that_mean_nothing_are_refused(build, options, said, tmp_path):
    save_pictures(tmp_path, "a.png")
    source = write_jsonl(tmp_path / "rows.jsonl", talk("Hi", "Ho"))
    if build is coco_caption_dataset:
        (tmp_path / "rows.jsonl").write_text('{"images": [], "annotations": []}')
    if build is caption_folder_dataset:
        source = str(tmp_path)
    with pytest.raises(ValueError, match=said):
        build(transform(), source=source, **options)


@pytest.mark.parametrize(
    ("build", "row", "said"),
    [
        (llava_dataset, talk("<image>?", "A.", images=["a.png"]), "image or video .* is images;"),
        (llava_dataset, talk("Hi", "A.", audio="a.wav"), "is audio;"),
        (llava_dataset, talk("Hi", "A.", Image="a.png"), "is Image;"),
        (llava_dataset, talk("Hi", "A.", image_file="a.png"), "is image_file;"),
        (swift_dataset, {"messages": talked("Hi", "A."), "VIDEO_PATHS": ["a"]}, "is VIDEO_PATHS;"),
        (sharegpt_dataset, talk("Hi", "A.", image="a.png"), "images or videos .* is image;"),
        (swift_dataset, {"messages": talked("Hi", "A."), "image": "a.png"}, "is image;"),
        (openai_dataset, {"messages": talked("<image>?", "A."), "images": ["a"]}, "is images;"),
        (openai_dataset, {"messages": talked("Hi", "A."), "video": "a.mp4"}, "is video;"),
        (hf_dataset, {"prompt": "Hi", "completion": "A.", "image_url": "a.png"}, "is image_url;"),
        (
            openai_dataset,
            {"messages": [{**talked("<image>?", "")[0], "images": ["a.png"]}]},
            "keys of the row|is images;",
        ),
    ],
)
def test_media_that_a_format_does_not_read_are_refused(build, row, said, tmp_path):
    dataset = build(transform(), source=write_jsonl(tmp_path / "rows.jsonl", row))
    with pytest.raises(ValueError, match=f"row 0: media stand under .*{said}"):
        dataset[0]


def test_the_pixel_limit_reaches_the_loader(source):
    with pytest.raises(ValueError, match=r"row 0: .*a.png: 56x84 is more than pixel_limit=4000"):
        llava_dataset(transform(), source=source, pixel_limit=4000)[0]


def test_reports_are_plain_json(report, source):
    with open(report) as file:
        (entry,) = json.load(file)["datasets"]
    assert entry["source"] == source
    assert [(bad["row"], bad["kind"]) for bad in entry["bad"]] == [(2, "bad"), (4, "bad")]
