"""Weights of messages and rows: on every label of their answers, and nowhere else."""

import json

import numpy as np
import pytest
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORE

from tests.data_samples import save_pictures, transform, write_jsonl
from torchtune_qwen25vl import padded_collate
from torchtune_qwen25vl.data import (
    caption_dataset,
    llava_dataset,
    openai_dataset,
    sharegpt_dataset,
    swift_dataset,
    swift_preference_dataset,
)
from torchtune_qwen25vl.data._preview import preview


def spoken(*marks):
    """Messages of ms-swift or OpenAI, an answer with each of these marks."""
    said = []
    for k, mark in enumerate(marks):
        said.append({"role": "user", "content": f"Question {k}?"})
        said.append({"role": "assistant", "content": "A " * (k + 1) + ".", **mark})
    return said


def talked(*marks):
    keys = {"role": "from", "content": "value"}
    names = {"user": "human", "assistant": "gpt"}
    return [
        {keys.get(k, k): names.get(v, v) if k == "role" else v for k, v in message.items()}
        for message in spoken(*marks)
    ]


def weights_of(sample):
    """The weight of each answer, and that it stands at every label of it."""
    labels, weights = np.asarray(sample["labels"]), sample["label_weights"].numpy()
    assert len(labels) == len(weights)
    assert ((labels != IGNORE) == (weights > 0)).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], weights > 0, [0]])))
    runs = [weights[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert all(len(set(run)) == 1 for run in runs)
    return [pytest.approx(run[0]) for run in runs]


MARKS = ({"loss": True, "loss_scale": 0.5}, {"weight": 0}, {"weight": 3}, {})


@pytest.mark.parametrize(
    ("build", "key", "make"),
    [
        (swift_dataset, "messages", spoken),
        (openai_dataset, "messages", spoken),
        (llava_dataset, "conversations", talked),
        (sharegpt_dataset, "conversations", talked),
    ],
)
def test_messages_weigh_what_they_say(tmp_path, build, key, make):
    rows = [{key: make(*MARKS)}, {key: make(*MARKS), "weight": 0.2}, {key: make({}, {})}]
    dataset = build(transform(), source=write_jsonl(tmp_path / "r.jsonl", *rows))
    assert weights_of(dataset[0]) == [0.5, 3, 1]
    assert weights_of(dataset[1]) == [0.1, 0.6, 0.2]
    assert "label_weights" not in dataset[2]
    plain = [row | {"weight": 1} for row in rows[2:]]
    same = build(transform(), source=write_jsonl(tmp_path / "p.jsonl", *plain))[0]
    assert same.keys() == dataset[2].keys()
    assert same["labels"] == dataset[2]["labels"]


def test_a_row_of_weight_0_has_no_labels(tmp_path):
    row = {"messages": spoken({}, {}), "weight": 0}
    sample = swift_dataset(transform(), source=write_jsonl(tmp_path / "r.jsonl", row))[0]
    assert set(sample["labels"]) == {IGNORE}
    assert not sample["label_weights"].any()


def test_weights_in_a_table(tmp_path):
    save_pictures(tmp_path, "a.png")
    rows = "a.png,A red apple.,0.5\na.png,A.,\na.png,A.,much\n"
    (tmp_path / "r.csv").write_text("image,caption,weight\n" + rows)
    dataset = caption_dataset(transform(), source=str(tmp_path / "r.csv"))
    assert weights_of(dataset[0]) == [0.5]
    assert "label_weights" not in dataset[1]
    with pytest.raises(ValueError, match="row 2: 'weight' is a number from 0, got 'much'"):
        dataset[2]


def test_turns_that_are_cut_off_take_their_weights_along(tmp_path):
    marks = ({"weight": 2}, {"weight": 3}, {"weight": 4})
    source = write_jsonl(tmp_path / "r.jsonl", {"messages": spoken(*marks)})
    whole = swift_dataset(transform(), source=source)[0]
    short = transform(max_seq_len=len(whole["tokens"]) - 4, over_long="truncate")
    assert weights_of(whole) == [2, 3, 4]
    assert weights_of(swift_dataset(short, source=source)[0]) == [2, 3]


def test_an_answer_and_its_call_weigh_the_same(tmp_path):
    call = json.dumps({"name": "rain", "arguments": {}})
    rows = []
    for weight in (0.5, 2):
        said = spoken({"loss_scale": 0.5})
        rows.append({"messages": [*said, {"role": "tool_call", "content": call, "weight": weight}]})
    dataset = swift_dataset(transform(), source=write_jsonl(tmp_path / "r.jsonl", *rows))
    assert weights_of(dataset[0]) == [0.5]
    with pytest.raises(ValueError, match=r"row 1: a call of a tool .* got \[0.5, 2.0\]"):
        dataset[1]


def test_the_preview_shows_weights(tmp_path):
    source = write_jsonl(tmp_path / "r.jsonl", {"messages": spoken({"weight": 0.25}, {})})
    lines = preview(swift_dataset(transform(), source=source)[0], transform()).splitlines()
    assert "x0.25 | A .<|im_end|>" in lines
    assert "train | A A .<|im_end|>" in lines


@pytest.mark.parametrize("value", [-1, "no", float("inf"), [1]])
@pytest.mark.parametrize("where", ["row", "message"])
def test_weights_that_cannot_be(tmp_path, value, where):
    mark = {"weight": value}
    row = {"messages": spoken(mark if where == "message" else {})}
    source = write_jsonl(tmp_path / "r.jsonl", row | (mark if where == "row" else {}))
    with pytest.raises(ValueError, match="'weight' is a number from 0, got"):
        swift_dataset(transform(), source=source)[0]


def test_who_cannot_heed_weights_refuses_them(tmp_path):
    row = {"messages": spoken({"weight": 2}), "rejected_response": "Who?"}
    source = write_jsonl(tmp_path / "r.jsonl", row, {**row, "messages": spoken({}), "weight": 2})
    pairs = swift_preference_dataset(transform(), source=source)
    for index in range(2):
        with pytest.raises(ValueError, match="answers of preference have no weights other than 1"):
            pairs[index]
    sample = swift_dataset(transform(), source=source)[0]
    with pytest.raises(ValueError, match="are heeded by the recipe finetune, but not by this one"):
        padded_collate([sample], 0)
