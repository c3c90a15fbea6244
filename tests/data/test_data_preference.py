"""Rows of preference in the public formats: both answers to the letter, images in their places."""

import json

import datasets
import pytest
import torch

from tests.data_samples import save_pictures, transform, write_json, write_jsonl
from torchtune_qwen25vl.data import (
    hf_preference_dataset,
    preference_dataset,
    sharegpt_preference_dataset,
    swift_preference_dataset,
)
from torchtune_qwen25vl.data._check import check_rows

SHOWN = "<|vision_start|>{}<|vision_end|>"
PROMPT = "<|im_start|>user\n{}What is this?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def pictures(tmp_path):
    """Three pictures: a.png and b.png of one size, c.png of another."""
    save_pictures(tmp_path, "a.png", "b.png")
    save_pictures(tmp_path, "c.png", width=84)


def told(sample):
    """The text of a sample with one placeholder for each image, and the text that is trained on."""
    tokenizer = transform()
    tokens = sample["tokens"]
    placeholder = tokenizer.special_tokens["<|image_pad|>"]
    first = torch.cat([torch.tensor([True]), tokens[1:] != tokens[:-1]])
    shown = tokenizer.decode(
        tokens[(tokens != placeholder) | first].tolist(), skip_special_tokens=False
    )
    trained = tokenizer.decode(tokens[~sample["mask"]].tolist(), skip_special_tokens=False)
    return shown.removeprefix(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    ), trained


def pixels(sample):
    return sample["encoder_input"]["vision"]["pixel_values"]


def image(count=1):
    return SHOWN.format("<|image_pad|>") * count


def assert_pair(sample, asked, chosen="A red apple.", rejected="Who are they?"):
    """Both answers to this prompt, each trained on with its end alone."""
    for answer, text in ((sample, chosen), (sample["rejected"], rejected)):
        shown, trained = told(answer)
        assert shown.rstrip("\n") == f"{asked}{text}<|im_end|>"
        assert trained == f"{text}<|im_end|>"
    assert "liked" not in sample


def spoken(role, *parts):
    return {
        "role": role,
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


TRL = {
    "images": ["a.png"],
    "prompt": [spoken("user", {"type": "image"}, "What is this?")],
    "chosen": [spoken("assistant", "A red apple.")],
    "rejected": [spoken("assistant", "Who are they?")],
}
SWIFT = {
    "messages": [
        {"role": "user", "content": "<image>What is this?"},
        {"role": "assistant", "content": "A red apple."},
    ],
    "images": ["a.png"],
    "rejected_response": "Who are they?",
}
FACTORY = {
    "conversations": [{"from": "human", "value": "<image>What is this?"}],
    "chosen": {"from": "gpt", "value": "A red apple."},
    "rejected": {"from": "gpt", "value": "Who are they?"},
    "images": ["a.png"],
}
TWO_U1 = {
    "image": "a.png",
    "prompt": "<image>\nWhat is this?",
    "chosen": "A red apple.",
    "rejected": "Who are they?",
}
RLAIF = {**{k: v for k, v in TWO_U1.items() if k != "prompt"}, "question": "What is this?"}
RLHF = {
    "image": "a.png",
    "text": json.dumps({k: RLAIF[k] for k in ("question", "chosen", "rejected")}),
}
IMPLICIT = {
    "images": ["a.png"],
    **{key: [*TRL["prompt"], *TRL[key]] for key in ("chosen", "rejected")},
}
MESSAGES = {
    **{k: v for k, v in SWIFT.items() if k != "rejected_response"},
    "rejected_messages": [SWIFT["messages"][0], {"role": "assistant", "content": "Who are they?"}],
}
FORMS = {
    "trl": (hf_preference_dataset, TRL),
    "whole conversations": (hf_preference_dataset, IMPLICIT),
    "ms-swift": (swift_preference_dataset, SWIFT),
    "ms-swift, messages": (swift_preference_dataset, MESSAGES),
    "llama-factory": (sharegpt_preference_dataset, FACTORY),
    "2U1": (preference_dataset, TWO_U1),
    "rlaif-v": (preference_dataset, RLAIF),
    "rlhf-v": (preference_dataset, RLHF),
}


def dataset(build, path, *rows, **options):
    return build(transform(), source=write_json(path / "rows.json", *rows), **options)


@pytest.mark.parametrize("form", FORMS)
def test_both_answers_of_every_form(tmp_path, form):
    build, row = FORMS[form]
    (sample,) = list_of(dataset(build, tmp_path, row))
    assert_pair(sample, PROMPT.format(image()))
    assert torch.equal(pixels(sample), pixels(sample["rejected"]))


@pytest.mark.parametrize("form", FORMS)
def test_rejected_images_are_those_of_the_rejected_answer_alone(tmp_path, form):
    build, row = FORMS[form]
    rows = [row, {**row, "rejected_images": ["b.png"]}, {**row, "rejected_images": "c.png"}]
    plain, other, larger = list_of(dataset(build, tmp_path, *rows))
    for sample in (other, larger):
        assert_pair(sample, PROMPT.format(image()))
        assert torch.equal(pixels(sample), pixels(plain))
        assert not torch.equal(pixels(sample["rejected"])[:16], pixels(plain)[:16])
    assert len(pixels(larger["rejected"])) > len(pixels(plain))


def list_of(made):
    return [made[index] for index in range(len(made))]


def test_texts_alone(tmp_path):
    rows = [{"prompt": "What is this?", "chosen": "A red apple.", "rejected": "Who are they?"}]
    for build in (hf_preference_dataset, preference_dataset):
        (sample,) = list_of(dataset(build, tmp_path, *rows))
        assert_pair(sample, PROMPT.format(""))
        assert "encoder_input" not in sample


def test_of_a_longer_conversation_the_last_answer_alone_is_trained_on(tmp_path):
    before = [spoken("user", "Who are they?"), spoken("assistant", "Describe this image.")]
    row = {**TRL, "prompt": [*before, *TRL["prompt"]]}
    (sample,) = list_of(dataset(hf_preference_dataset, tmp_path, row))
    turns = "<|im_start|>user\nWho are they?<|im_end|>\n<|im_start|>assistant\n"
    turns += "Describe this image.<|im_end|>\n"
    assert_pair(sample, turns + PROMPT.format(image()))


def test_columns_of_the_hub(tmp_path):
    rows = {
        "image": [str(tmp_path / "a.png"), str(tmp_path / "b.png")],
        "question": ["What is this?"] * 2,
        "chosen": ["A red apple."] * 2,
        "rejected": ["Who are they?"] * 2,
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    for sample in list_of(preference_dataset(transform(), source=str(tmp_path / "saved"))):
        assert_pair(sample, PROMPT.format(image()))


@pytest.mark.parametrize(
    ("build", "row", "mark"),
    [
        (
            hf_preference_dataset,
            {"prompt": TRL["prompt"], "completion": TRL["chosen"], "images": ["a.png"]},
            "label",
        ),
        (
            preference_dataset,
            {"prompt": "What is this?", "completion": "A red apple.", "image": "a.png"},
            "label",
        ),
        (swift_preference_dataset, {k: SWIFT[k] for k in ("messages", "images")}, "label"),
        (
            sharegpt_preference_dataset,
            {"conversations": [*FACTORY["conversations"], FACTORY["chosen"]], "images": ["a.png"]},
            "kto_tag",
        ),
    ],
    ids=["trl", "plain", "ms-swift", "llama-factory"],
)
def test_an_answer_alone_is_liked_or_not(tmp_path, build, row, mark):
    rows = [{**row, mark: True}, {**row, mark: False}, {**row, mark: "yes"}]
    rows.append({**row, mark: True, "rejected": "no", "rejected_response": "no"})
    made = dataset(build, tmp_path, *rows)
    for index, liked in enumerate((True, False)):
        shown, trained = told(made[index])
        assert shown.rstrip("\n") == f"{PROMPT.format(image())}A red apple.<|im_end|>"
        assert trained == "A red apple.<|im_end|>"
        assert made[index]["liked"] is liked
        assert "rejected" not in made[index]
    with pytest.raises(ValueError, match=f"row 2: '{mark}' is true or false, got 'yes'"):
        made[2]
    with pytest.raises(
        ValueError, match=f"row 3: a row is a pair, or one answer with '{mark}', but"
    ):
        made[3]


def test_columns_and_tags_are_renamed(tmp_path):
    row = {
        "talk": [{"who": "user", "text": "What is this?"}],
        "good": {"who": "bot", "text": "A red apple."},
        "bad": {"who": "bot", "text": "Who are they?"},
    }
    columns = {"messages": "talk", "chosen": "good", "rejected": "bad"}
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "user", "assistant_tag": "bot"}
    made = dataset(sharegpt_preference_dataset, tmp_path, row, columns=columns, tags=tags)
    assert_pair(made[0], PROMPT.format(""))


@pytest.mark.parametrize(
    ("build", "row", "said"),
    [
        (preference_dataset, {**TWO_U1, "rejected": "A red apple."}, "are the same, so the row te"),
        (preference_dataset, {**TWO_U1, "rejected": ""}, "empty answer"),
        (preference_dataset, {**TWO_U1, "rejected_image": "b.png"}, "stand under rejected_images,"),
        (preference_dataset, {**TWO_U1, "rejected_images": []}, "1 places .* for 0 images"),
        (preference_dataset, {**TWO_U1, "img": "b.png"}, "there is img; rename it"),
        (preference_dataset, {"prompt": "q", "chosen": "a"}, "no 'rejected' in the row"),
        (hf_preference_dataset, {**TRL, "rejected": TRL["prompt"]}, "ends with a turn of the"),
        (hf_preference_dataset, {**IMPLICIT, "rejected": TRL["prompt"]}, "ends with a turn of the"),
        (swift_preference_dataset, {**SWIFT, "rejected_videos": ["a.mp4"]}, "rejected_videos; re"),
        (
            swift_preference_dataset,
            {**SWIFT, "rejected_response": ["a"]},
            "a text is a string, got",
        ),
        (sharegpt_preference_dataset, {**FACTORY, "chosen": "a"}, "not laid out as its format say"),
    ],
)
def test_what_a_row_says_is_honoured_or_refused_by_its_number(tmp_path, build, row, said):
    good = next(row for form, row in FORMS.values() if form is build)
    made = dataset(build, tmp_path, good, row)
    with pytest.raises(ValueError, match=rf"rows.json, row 1: .*{said}"):
        made[1]


def test_an_over_long_answer_is_an_error_that_names_the_row(tmp_path):
    long = {**TWO_U1, "rejected": "What is this? " * 40}
    source = write_json(tmp_path / "rows.json", TWO_U1, long)
    made = preference_dataset(transform(max_seq_len=90), source=source)
    assert_pair(made[0], PROMPT.format(image()))
    with pytest.raises(ValueError, match=r"row 1: .*max_seq_len = 90 tokens, this one has \d+"):
        made[1]
    for over_long in ("shrink_images", "truncate"):
        with pytest.raises(ValueError, match=f"over_long is one of error, skip, got '{over_long}'"):
            preference_dataset(transform(over_long=over_long, max_seq_len=90), source=source)


def test_the_check_reads_both_answers(tmp_path):
    rows = [TWO_U1, {**TWO_U1, "rejected": ""}, {**TWO_U1, "rejected": "a <|box_start|> b"}]
    made = preference_dataset(transform(), source=write_jsonl(tmp_path / "rows.jsonl", *rows))
    sound, bad = check_rows(made, num_workers=0)
    assert [row.row for row in bad] == [1]
    assert [row.names for row in sound] == [(), ("<|box_start|>",)]
