"""The chain of the README: caption a folder, correct texts, check, train; all paths relative."""

import shutil

import captions
import pytest
import recipe_runs

from torchtune_qwen25vl import Qwen25VLTransform
from torchtune_qwen25vl.data import caption_dataset, caption_folder_dataset

FOLDER = "my [photos]"
CORRECTED = "A hat, corrected by hand."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return captions.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def here(tmp_path, model, monkeypatch):
    """A working directory with a model, and photos among what else lies in folders."""
    photos = captions.write_pictures(tmp_path / FOLDER, 3)
    for name in ("._a.png", "picture 000-masklabel.png", "@eaDir/b.png"):
        (photos / name).parent.mkdir(exist_ok=True)
        shutil.copy(photos / "picture 000.png", photos / name)
    (tmp_path / "model").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def caption(**changes):
    return captions.caption("model", [FOLDER], **changes)


@pytest.mark.parametrize("naming", ["stem", "full"])
@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_the_rows_are_those_that_were_captioned(here, model, naming, suffix):
    """Not the thumbnails of the review page, nor what captions leave out."""
    keys = {"text_naming": naming, "text_suffix": suffix}
    assert caption(outputs=["txt", "jsonl", "csv", "metadata"], **keys) == 0
    assert list((here / FOLDER / "_captions").glob("thumbnails/*.jpg"))  # the control
    name = f"picture 001{'.png' * (naming == 'full')}{suffix}"
    (here / FOLDER / name).write_text(CORRECTED)
    assert caption(outputs=["txt", "jsonl", "csv", "metadata"], table_paths="relative", **keys) == 0
    transform = Qwen25VLTransform.from_folder(model)
    folder = caption_folder_dataset(transform, source=FOLDER, text_suffix=suffix)
    assert len(folder) == 3
    expected = [row["caption"] for row in captions.rows(here / FOLDER / "_captions")]
    assert expected[1] == CORRECTED
    tables = [
        caption_dataset(transform, source=f"{FOLDER}/_captions/captions.jsonl"),
        caption_dataset(transform, source=f"{FOLDER}/_captions/captions.csv"),
        caption_dataset(
            transform,
            source=f"{FOLDER}/metadata.jsonl",
            image_column="file_name",
            caption_column="text",
        ),
    ]
    for dataset in (folder, *tables):
        assert texts(transform, dataset) == expected


def texts(transform, dataset):
    """What is trained on in each row, decoded."""
    rows = [dataset[index]["labels"] for index in range(3)]
    return [transform.decode([label for label in labels if label >= 0]) for labels in rows]


def test_corrected_captions_are_trained_on(here):
    assert caption(outputs=["txt", "jsonl"]) == 0
    (here / FOLDER / "picture 002.txt").write_text(CORRECTED)
    folder = "dataset._component_=torchtune_qwen25vl.data.caption_folder_dataset"
    recipe_runs.run_alone("finetune_lora", "model", FOLDER, "trained", [folder])
    assert len(recipe_runs.losses(here / "trained")) == 3  # 3 rows twice, 2 in a step
    assert captions.caption("trained/model", [FOLDER], existing="overwrite", restart=True) in (0, 1)
