"""Rows of a question and its answer: ms-swift's query and response, alpaca's instruction."""

import pytest

from tests.data_samples import messages_of, save_pictures, seen, transform, write_jsonl
from torchtune_qwen25vl.data import alpaca_dataset, swift_dataset, swift_preference_dataset


@pytest.fixture
def shown(tmp_path):
    return [seen(image) for image in save_pictures(tmp_path, "a.png", "b.png")]


EXPECTED = [
    ("system", ["Be brief."], False),
    ("user", ["a", "Who?"], False),
    ("assistant", ["They <image>."], True),
    ("user", ["And ", "b", "?\nIn a word."], False),
    ("assistant", ["A."], True),
]
COMMON = {
    "history": [["<image>Who?", "They <image>."]],
    "system": "Be brief.",
    "images": ["a.png", "b.png"],
}
SWIFT = {"query": "And <image>?\nIn a word.", "response": "A.", **COMMON}
ALPACA = {"instruction": "And <image>?", "input": "In a word.", "output": "A.", **COMMON}


@pytest.mark.parametrize(("build", "row"), [(swift_dataset, SWIFT), (alpaca_dataset, ALPACA)])
def test_history_comes_first(tmp_path, shown, build, row):
    dataset = build(transform(), source=write_jsonl(tmp_path / "r.jsonl", row))
    names = dict(zip("ab", shown, strict=True))
    expected = [(role, [names.get(p, p) for p in parts], t) for role, parts, t in EXPECTED]
    assert messages_of(dataset) == expected
    assert dataset[0]["encoder_input"]["vision"]["grid_thw"].shape == (2, 3)


def test_what_may_be_missing(tmp_path):
    rows = [
        {"instruction": "Hi", "input": "", "output": "Ho", "history": [], "system": None},
        {"instruction": "", "input": "Hi", "output": "Ho"},
    ]
    dataset = alpaca_dataset(transform(), source=write_jsonl(tmp_path / "r.jsonl", *rows))
    for index in range(2):
        assert messages_of(dataset, index) == [("user", ["Hi"], False), ("assistant", ["Ho"], True)]
    row = {"ask": "Hi", "answer": "Ho"}
    columns = {"prompt": "ask", "response": "answer"}
    source = write_jsonl(tmp_path / "r.jsonl", row)
    dataset = alpaca_dataset(transform(), source=source, columns=columns)
    assert messages_of(dataset)[1] == ("assistant", ["Ho"], True)
    with pytest.raises(ValueError, match=r"can be mapped are .*, got \['ask'\]"):
        alpaca_dataset(transform(), source=source, columns={"ask": "prompt"})


def test_boxes_tools_and_pairs_of_a_query(tmp_path):
    save_pictures(tmp_path, "a.png", width=280, height=280)
    objects = {"ref": [], "bbox": [[28, 28, 56, 56]]}
    row = {"query": "<image>Where?", "response": "<bbox>", "images": ["a.png"], "objects": objects}
    source = write_jsonl(tmp_path / "r.jsonl", row)
    dataset = swift_dataset(transform(max_pixels=140 * 140), source=source)
    assert messages_of(dataset)[1] == ("assistant", ["[14, 14, 28, 28]"], True)
    pair = {"query": "Who?", "response": "They.", "rejected_response": "A."}
    pairs = swift_preference_dataset(transform(), source=write_jsonl(tmp_path / "p.jsonl", pair))
    assert "rejected" in pairs[0]


@pytest.mark.parametrize(
    ("build", "change", "match"),
    [
        (swift_dataset, {"query": None}, "no 'query' in the row"),
        (swift_dataset, {"response": None}, "no 'response' in the row"),
        (swift_dataset, {"messages": [{"role": "user", "content": "Hi"}]}, "query, response, hist"),
        (swift_dataset, {"history": [["Hi"]]}, r"list of \[question, answer\], got \['Hi'\] in it"),
        (swift_dataset, {"history": ["Hi"]}, "got 'Hi' in it"),
        (swift_dataset, {"image": "a.png"}, "images or videos .* is image;"),
        (alpaca_dataset, {"instruction": None}, "no 'instruction' in the row"),
        (alpaca_dataset, {"output": ""}, "turn 4 is an empty answer"),
        (alpaca_dataset, {"images": ["a.png"]}, "got 2 places .* for 1 images"),
    ],
)
def test_queries_that_cannot_be(tmp_path, shown, build, change, match):
    row = {**(SWIFT if build is swift_dataset else ALPACA), **change}
    dataset = build(transform(), source=write_jsonl(tmp_path / "r.jsonl", row))
    with pytest.raises(ValueError, match=match):
        dataset[0]
