"""Parts of splits: shares and numbers, of every kind of rows, disjoint and complete."""

import json

import datasets
import pytest

from tests.data_samples import write_jsonl
from torchtune_qwen25vl.media import numbers_of_split, open_rows


def numbers(split, rows):
    return numbers_of_split("rows", split, rows).tolist()


@pytest.mark.parametrize("rows", [20, 21, 24, 99, 100, 101, 1000])
@pytest.mark.parametrize("share", ["95%", "50%", "33%", "99.5%"])
def test_shares_that_meet_have_every_row_once(rows, share):
    rest = 100 - float(share[:-1])
    assert len(numbers(f"train[:{share}]", rows)) == round(rows * float(share[:-1]) / 100)
    for end in (f"{share}:", f"-{rest:g}%:"):
        if round(rows * float(share[:-1]) / 100) < rows:
            both = numbers(f"train[:{share}]+train[{end}]", rows)
            assert both == list(range(rows))


@pytest.mark.parametrize(
    "split",
    [
        *("train", "train[:95%]", "train[95%:]", "train[10:20]", "train[-5:]", "train[:-5]"),
        *("train[:10%]+train[-5%:]", "train[1_0:]", "train[25%:75%]", "train[3:]+train[:3]"),
    ],
)
def test_parts_are_those_of_datasets(split):
    theirs = datasets.ReadInstruction.from_spec(split).to_absolute({"train": 60})
    assert numbers(split, 60) == [k for piece in theirs for k in range(piece.from_, piece.to)]


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ("train[:95%", "a split is a name, or parts"),
        ("train[95%]", "a split is a name, or parts"),
        ("train[:1.5]", "a split is a name, or parts"),
        ("", "a split is a name, or parts"),
        ("train[100:200]", r"train\[100:200\] has none of the 50 rows of train; widen the split"),
        ("train[-0.5%:]", "has none of the 50 rows"),  # a row is 2 %; datasets would take all
        ("train[:101%]", "shares from -100% to 100%, got 101%"),
        ("test[:5]", "is one split, called train, got test"),
    ],
)
def test_parts_that_cannot_be(split, match):
    with pytest.raises(ValueError, match=match):
        numbers(split, 50)


def test_every_kind_of_rows_has_parts(tmp_path):
    rows = [{"a": k} for k in range(20)]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.csv").write_text("a\n" + "".join(f"{k}\n" for k in range(20)))
    write_jsonl(tmp_path / "r.jsonl", *rows)
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "whole")
    splits = datasets.DatasetDict({"train": table, "test": table.select(range(3))})
    splits.save_to_disk(tmp_path / "splits")
    for name in ("r.json", "r.jsonl", "r.csv", "whole", "splits"):
        found = open_rows(str(tmp_path / name), split="train[:2]+train[-5%:]")
        assert [int(found[k]["a"]) for k in range(len(found))] == [0, 1, 19]
        assert [int(value) for value in found.column("a")] == [0, 1, 19]
        assert found.digest(2) == open_rows(str(tmp_path / name)).digest(19)
    both = open_rows(str(tmp_path / "splits"), split="test+train[19:]")
    assert [both[k]["a"] for k in range(4)] == [0, 1, 2, 19]
