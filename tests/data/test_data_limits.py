"""What a dataset takes over from its transform, and where its paths start."""

import pytest
from datasets import Dataset as Stored

from tests.data_samples import messages_of, save_pictures, transform, write_jsonl
from torchtune_qwen25vl.data import llava_dataset


def talk(question, answer, **row):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**row, "conversations": said}


@pytest.mark.parametrize(
    ("limits", "side"),
    [
        ({"min_pixels": 112 * 112}, 112),  # enlarged
        ({"min_pixels": 28 * 28, "max_pixels": 28 * 28}, 28),  # shrunk
        ({"min_pixels": 28 * 28}, 56),
    ],
)
def test_boxes_are_moved_to_the_size_that_the_transform_gives(tmp_path, limits, side):
    save_pictures(tmp_path, "a.png", width=56, height=56)
    row = talk("<image>\nWhere?", '"bbox_2d": [0, 14, 28, 56]', image="a.png")
    source = write_jsonl(tmp_path / "rows.jsonl", row)
    dataset = llava_dataset(transform(**limits), source=source, boxes="original")
    assert dataset[0]["encoder_input"]["vision"]["grid_thw"].tolist() == [
        [1, side // 14, side // 14]
    ]
    moved = [0, side // 4, side // 2, side]
    assert messages_of(dataset)[1][1] == [f'"bbox_2d": {moved}']


def test_the_media_root_may_be_in_the_home_folder(tmp_path, monkeypatch):
    save_pictures(tmp_path, "home/media/a.png")
    source = write_jsonl(tmp_path / "rows.jsonl", talk("<image>\nWhat?", "That.", image="a.png"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sample = llava_dataset(transform(), source=source, media_root="~/media")[0]
    assert sample["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 6, 4]]


def test_paths_of_a_saved_set_start_in_its_folder(tmp_path):
    folder = tmp_path / "saved"
    Stored.from_list([talk("<image>\nWhat?", "That.", image="a.png")]).save_to_disk(str(folder))
    save_pictures(folder, "a.png")
    sample = llava_dataset(transform(), source=str(folder))[0]
    assert sample["encoder_input"]["vision"]["grid_thw"].tolist() == [[1, 6, 4]]
    (folder / "a.png").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"saved/a.png: no such file"):
        llava_dataset(transform(), source=str(folder))[0]
