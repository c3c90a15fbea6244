"""Mixtures: several data sets as one, what cannot be mixed, and the check of every part."""

import json

import pytest
from omegaconf import OmegaConf

from parity import vocabulary
from tests.data_samples import SAYINGS, save_pictures, transform, write_jsonl
from torchtune_qwen25vl import data
from torchtune_qwen25vl.data import mixture
from torchtune_qwen25vl.data.__main__ import main

BUILDERS = "torchtune_qwen25vl.data"


def section(builder, source, **options):
    return {"_component_": f"{BUILDERS}.{builder}", "source": str(source), **options}


@pytest.fixture
def parts(tmp_path):
    """Sections of three parts: talks of 4 rows, captions of 3, texts of 2."""
    save_pictures(tmp_path, "a.png")
    said = [
        [{"from": "human", "value": f"Hi {k}"}, {"from": "gpt", "value": f"Ho {k}"}]
        for k in range(4)
    ]
    write_jsonl(tmp_path / "talks.jsonl", *({"conversations": turns} for turns in said))
    rows = "".join(f"a.png,A red apple {k}\n" for k in range(3))
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    texts = [{"prompt": "Who?", "completion": f"They {k}."} for k in range(2)]
    write_jsonl(tmp_path / "texts.jsonl", *texts)
    return [
        section("llava_dataset", tmp_path / "talks.jsonl"),
        section("caption_dataset", tmp_path / "captions.csv"),
        section("hf_dataset", tmp_path / "texts.jsonl"),
    ]


def answers(dataset):
    tokenizer = transform()
    texts = []
    for index in range(len(dataset)):
        sample = dataset[index]
        texts.append(tokenizer.decode(sample["tokens"][~sample["mask"]].tolist()))
    return texts


TALKS = [f"Ho {k}" for k in range(4)]
CAPTIONS = [f"A red apple {k}" for k in range(3)]


def test_the_first_pass_has_of_each_part_what_is_asked(parts):
    amounts = [{"weight": 0.5}, {"weight": 2}, {"count": 3}]
    mixed = mixture(
        transform(),
        datasets=[part | amount for part, amount in zip(parts, amounts, strict=True)],
    )
    texts = ["They 0.", "They 1.", "They 0."]
    assert answers(mixed) == [*TALKS[:2], *CAPTIONS, *CAPTIONS, *texts]
    assert answers(mixed.joined) == [*TALKS, *CAPTIONS, "They 0.", "They 1."]
    assert [amount.of_pass(10) for amount in mixed.amounts] == [5, 20, 3]


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SAID = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
PAIR = {"chosen": "A red apple.", "rejected": "Who are they?"}
ROWS = {
    "llava_dataset": {"conversations": SAID},
    "sharegpt_dataset": {"conversations": SAID},
    "swift_dataset": {"messages": TALK},
    "alpaca_dataset": {"instruction": "Hi", "output": "Ho"},
    "openai_dataset": {"messages": TALK},
    "hf_dataset": {"prompt": "Hi", "completion": "Ho"},
    "caption_dataset": {"image": "a.png", "caption": "A red apple."},
    "coco_caption_dataset": {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "A red apple."}],
    },
    "caption_folder_dataset": None,
    "preference_dataset": {"prompt": "What is this?", **PAIR},
    "hf_preference_dataset": {"prompt": "What is this?", **PAIR},
    "sharegpt_preference_dataset": {
        "conversations": SAID[:1],
        "chosen": SAID[1],
        "rejected": {"from": "gpt", "value": "No"},
    },
    "swift_preference_dataset": {"messages": TALK, "rejected_response": "No"},
}


@pytest.mark.parametrize("preference", [False, True])
def test_every_builder_is_mixed(tmp_path, preference):
    assert set(ROWS) == {name for name in data.__all__ if name.endswith("_dataset")}
    save_pictures(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("A red apple.")
    parts = []
    for name, row in ROWS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(row if "coco" in name else [row]))
        source = tmp_path if row is None else path
        parts += [section(name, source, weight=3)] if ("preference" in name) == preference else []
    mixed = mixture(transform(), datasets=parts)
    assert len(mixed) == 3 * len(parts)
    assert len(answers(mixed)) == len(mixed)


def test_a_bad_row_is_named_by_its_own_part(parts, tmp_path):
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write('{"prompt": "Who?"}\n')
    mixed = mixture(transform(), datasets=parts)
    with pytest.raises(ValueError, match=r"texts.jsonl, row 2: no 'completion'"):
        mixed[9]
    with pytest.raises(ValueError, match=r"texts.jsonl, row 2: no 'completion'"):
        mixed.joined[9]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"skip_bad_rows": "x"}, "skip_bad_rows names no file: x"),
        ({"weight": 0}, r"datasets\[1\]: a weight is a number above 0, got 0"),
        ({"weight": -1.0}, "got -1.0"),
        ({"weight": "2"}, "got '2'"),
        ({"weight": True}, "got True"),
        ({"weight": float("inf")}, "got inf"),
        ({"weight": 0.1}, "with weight 0.1 a pass has none of the 3 rows of .*captions.csv"),
        ({"count": 0}, "a count is a whole number from 1, got 0"),
        ({"count": 2.5}, "got 2.5"),
        ({"count": None}, "got None"),
        ({"count": 3, "weight": 1}, "a weight and a count; give one"),
        ({"sorce": "x"}, r"datasets\[1\] cannot be built|mean nothing for a file"),
        ({"_component_": f"{BUILDERS}.nothing"}, r"datasets\[1\] cannot be built"),
        ({"_component_": "torch.utils.data.ChainDataset"}, r"datasets\[1\] cannot be built"),
        ({"_component_": "tests.data_samples.save_pictures"}, "takes the builders of"),
    ],
)
def test_parts_that_cannot_be_mixed(parts, change, match):
    if "save_pictures" in str(change):
        parts[1] = {"_component_": "tests.data_samples.functools.partial"}  # of the transform
    else:
        parts[1] |= change
    with pytest.raises(ValueError, match=match):
        mixture(transform(), datasets=parts)


def test_sets_that_are_no_mixture(parts, tmp_path):
    for wrong in ([], {}, "x", 3):
        with pytest.raises(ValueError, match="datasets is a list of sections"):
            mixture(transform(), datasets=wrong)
    with pytest.raises(ValueError, match=r"datasets\[0\] is a section"):
        mixture(transform(), datasets=["x"])
    inner = {"_component_": f"{BUILDERS}.mixture", "datasets": parts[1:]}
    with pytest.raises(ValueError, match=r"datasets\[1\] is a mixture itself; list its parts"):
        mixture(transform(), datasets=[parts[0], inner])
    (tmp_path / "empty.jsonl").write_text("\n")
    parts[2]["source"] = str(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"datasets\[2\], .*empty.jsonl, has no rows"):
        mixture(transform(), datasets=parts)


def test_rows_of_preference_are_mixed_among_themselves_alone(parts, tmp_path):
    pair = {"prompt": "What?", "chosen": "A red apple.", "rejected": "Who are they?"}
    pairs = section("preference_dataset", write_jsonl(tmp_path / "pairs.jsonl", pair))
    texts = section("hf_preference_dataset", tmp_path / "pairs.jsonl", weight=2)
    assert len(mixture(transform(), datasets=[pairs, texts])) == 3
    with pytest.raises(ValueError, match=r"pairs.jsonl has the former and .*talks.jsonl the la"):
        mixture(transform(), datasets=[parts[0], pairs])


def test_every_part_is_checked_and_its_bad_rows_are_left_out(parts, tmp_path, capsys):
    with (tmp_path / "talks.jsonl").open("a") as file:
        file.write('{"conversations": []}\n')
    recipe = {
        "tokenizer": {
            "_component_": "torchtune_qwen25vl.Qwen25VLTransform",
            "path": str(vocabulary.small(SAYINGS) / "tokenizer.json"),
        },
        "dataset": {"_component_": f"{BUILDERS}.mixture", "datasets": parts},
    }
    OmegaConf.save(recipe, tmp_path / "recipe.yaml")
    report = tmp_path / "report" / "report.json"
    words = ["check", str(tmp_path / "recipe.yaml"), "--report", str(report.parent)]
    assert main([*words, "--num-workers=0", "--preview=1"]) == 1
    entries = json.loads(report.read_text())["datasets"]
    assert [(entry["key"], entry["rows"], len(entry["bad"])) for entry in entries] == [
        ("dataset.datasets[0]", 5, 1),
        ("dataset.datasets[1]", 3, 0),
        ("dataset.datasets[2]", 2, 0),
    ]
    printed = capsys.readouterr().out
    assert printed.count("row 0\n") == 3
    assert "talks.jsonl, row 4: " in printed
    again = main([*words, "--num-workers=0", f"dataset.skip_bad_rows={report}"])
    assert again == 1, "the check reads all rows"
    mixed = mixture(transform(), datasets=parts, skip_bad_rows=str(report))
    assert answers(mixed) == [*TALKS, *CAPTIONS, "They 0.", "They 1."]
    assert mixed.joined.bad_rows == (4,)
    for wrong in (["x"], 3):
        recipe["dataset"]["datasets"] = wrong
        OmegaConf.save(recipe, tmp_path / "recipe.yaml")
        assert main(words) == 2
        assert "datasets" in capsys.readouterr().err
    parts[0]["skip_bad_rows"] = None  # its own goes before that of the mixture
    assert len(mixture(transform(), datasets=parts, skip_bad_rows=str(report))) == 10
