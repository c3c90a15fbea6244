"""The check command: every row read, bad ones listed, what is trained on shown."""

import json
import re
import runpy

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX as IGNORE

from parity import vocabulary
from tests.data_samples import SAYINGS, save_pictures, transform, write_jsonl
from torchtune_qwen25vl import _torchtune
from torchtune_qwen25vl.data import llava_dataset
from torchtune_qwen25vl.data.__main__ import main
from torchtune_qwen25vl.data._check import trained_tokens


def talk(question, answer, **row):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**row, "conversations": said}


@pytest.fixture
def recipe(tmp_path):
    """A recipe's config over good.jsonl (3 rows) and bad.jsonl (the same and 3 bad ones)."""
    save_pictures(tmp_path, "a.png")
    good = [
        talk("<image>\nWhat?", "That.", image="a.png"),
        talk("Hi\nyou", "Ho"),
        talk("<image>\n<image>\nWhat?", "Two.", image=["a.png", "a.png"]),
    ]
    bad = [talk("<image>\nWhat?", "That."), talk("Hi", "Ho " * 200), {"conversations": []}]
    write_jsonl(tmp_path / "bad.jsonl", *good, *bad)
    recipe = {
        "model_dir": str(vocabulary.small(SAYINGS)),
        "model": {"_component_": "not.looked.at"},
        "tokenizer": {
            "_component_": "torchtune_qwen25vl.transform._transform.Qwen25VLTransform",
            "path": "${model_dir}/tokenizer.json",
            "max_seq_len": 120,
        },
        "dataset": {
            "_component_": "torchtune_qwen25vl.data.llava_dataset",
            "source": write_jsonl(tmp_path / "good.jsonl", *good),
        },
    }
    OmegaConf.save(recipe, tmp_path / "recipe.yaml")
    return str(tmp_path / "recipe.yaml")


@pytest.fixture
def check(tmp_path, recipe, capsys):
    def run(*arguments):
        """Exit code, report, and what was printed."""
        report = tmp_path / "report"
        code = main(["check", recipe, "--num-workers=0", "--report", str(report), *arguments])
        content = report / "report.json"
        return code, content.exists() and json.loads(content.read_text()), capsys.readouterr()

    return run


def test_a_sound_set(check, tmp_path):
    code, report, printed = check()
    assert code == 0
    (entry,) = report["datasets"]
    assert (entry["rows"], entry["sound"], entry["bad"]) == (3, 3, [])
    dataset = llava_dataset(transform(), source=str(tmp_path / "good.jsonl"))
    lengths = [len(dataset[row]["tokens"]) for row in range(3)]
    labelled = [sum(label != IGNORE for label in dataset[row]["labels"]) for row in range(3)]
    statistics = entry["statistics"]
    assert statistics["tokens"]["total"] == sum(lengths)
    assert statistics["tokens"]["max"] == max(lengths)
    assert statistics["labelled_tokens"]["median"] == np.median(labelled)
    assert statistics["labelled_share"] == sum(labelled) / sum(lengths)
    assert statistics["visual_tokens"] == {
        "total": 18,
        "mean": 6,
        "min": 0,
        "median": 6,
        "p95": pytest.approx(11.4),
        "max": 12,
    }
    assert statistics["images_and_videos"]["total"] == 3
    assert statistics["pixels"]["mean"] == 56 * 84
    assert "3 rows, 0 bad, 0 skipped" in printed.out
    assert "row/s" in printed.err
    assert Image.open(tmp_path / "report" / "histogram-0.png").size == (1200, 360)
    assert not list((tmp_path / "report").glob(".*"))


def test_bad_rows_are_listed_and_the_rest_is_measured(check, tmp_path):
    source = f"dataset.source={tmp_path / 'bad.jsonl'}"
    code, report, printed = check(source)
    assert code == 1
    (entry,) = report["datasets"]
    assert (entry["rows"], entry["sound"]) == (6, 3)
    assert [(bad["row"], bad["kind"]) for bad in entry["bad"]] == [
        (3, "bad"),
        (4, "bad"),
        (5, "bad"),
    ]
    for bad, part in zip(
        entry["bad"], ["got 1 places", "max_seq_len = 120", "teaches"], strict=True
    ):
        assert f"bad.jsonl, row {bad['row']}: " in bad["error"]
        assert part in bad["error"]
        assert f"bad: {bad['error']}" in printed.out
    with_workers = check(source, "--num-workers=2")
    assert with_workers[:2] == (code, report)


def test_rows_to_skip_are_listed_but_not_bad(check, tmp_path):
    write_jsonl(tmp_path / "long.jsonl", talk("Hi", "Ho"), talk("Hi", "Ho " * 200))
    source = str(tmp_path / "long.jsonl")
    code, report, printed = check(f"dataset.source={source}", "tokenizer.over_long=skip")
    assert code == 0
    assert [(bad["row"], bad["kind"]) for bad in report["datasets"][0]["bad"]] == [(1, "skipped")]
    assert "2 rows, 0 bad, 1 skipped" in printed.out
    skipping = transform(max_seq_len=120, over_long="skip")
    path = str(tmp_path / "report" / "report.json")
    dataset = llava_dataset(skipping, source=source, skip_bad_rows=path)
    assert len([dataset[index] for index in range(len(dataset))]) == 1


def test_the_whole_set_is_read_though_rows_are_left_out_in_training(check, tmp_path):
    source = f"dataset.source={tmp_path / 'bad.jsonl'}"
    _, first, _ = check(source)
    path = tmp_path / "report" / "report.json"
    code, again, _ = check(source, f"dataset.skip_bad_rows={path}")
    assert (code, again) == (1, first)


def test_preview_shows_what_is_trained_on(check):
    _, _, printed = check("--preview", "2")
    first, second = printed.out.split("--- ")[1:]
    assert first.splitlines()[1:] == [
        "      | <|im_start|>system\\n",
        "      | You are a helpful assistant.<|im_end|>\\n",
        "      | <|im_start|>user\\n",
        "      | <|vision_start|><|image_pad|> x 6<|vision_end|>What?<|im_end|>\\n",
        "      | <|im_start|>assistant\\n",
        "train | That.<|im_end|>",
        "      | \\n",
    ]
    assert "      | Hi\\n\n      | you<|im_end|>\\n" in second
    assert "train | Ho<|im_end|>" in second


def test_trained_tokens_go_by_where_the_installed_torchtune_shifts_labels(monkeypatch):
    tokens = np.array([5, 6, 7, 8, 8, 9])
    shifted_by = {
        "recipes": [IGNORE, IGNORE, 7, 8, IGNORE, IGNORE],
        "datasets": [IGNORE, 7, 8, IGNORE, IGNORE, IGNORE],
    }
    for shifts, labels in shifted_by.items():
        monkeypatch.setattr(_torchtune, "RECIPES_SHIFT_LABELS", shifts == "recipes")
        trained = trained_tokens({"tokens": tokens, "labels": labels})
        assert trained.tolist() == [False, False, True, True, False, False]
        assert not trained_tokens({"tokens": tokens, "labels": [IGNORE] * 6}).any()
        for other in shifted_by.values():
            found = trained_tokens({"tokens": tokens, "labels": other})
            assert torch.equal(found, trained) == (other == labels)


def test_several_data_sets(check, tmp_path, recipe):
    cfg = OmegaConf.load(recipe)
    second = {**cfg.dataset, "source": str(tmp_path / "bad.jsonl")}
    cfg.dataset = [cfg.dataset, second]
    OmegaConf.save(cfg, recipe)
    code, report, _ = check()
    assert code == 1
    assert [entry["rows"] for entry in report["datasets"]] == [3, 6]
    assert (tmp_path / "report" / "histogram-1.png").exists()


def test_the_validation_data_is_checked_too(check, tmp_path, recipe):
    cfg = OmegaConf.load(recipe)
    cfg.val_dataset = {**cfg.dataset, "source": str(tmp_path / "bad.jsonl")}
    OmegaConf.save(cfg, recipe)
    code, report, printed = check("--preview=1")
    assert code == 1
    assert [(entry["key"], entry["rows"]) for entry in report["datasets"]] == [
        ("dataset", 3),
        ("val_dataset", 6),
    ]
    for key, name in (("dataset", "good"), ("val_dataset", "bad")):
        source = tmp_path / f"{name}.jsonl"
        assert f"\n{key} {source}: " in printed.out
        assert f"--- {key} {source}, row 0" in printed.out
    cfg.val_dataset = None
    OmegaConf.save(cfg, recipe)
    code, report, _ = check()
    assert (code, len(report["datasets"])) == (0, 1)


def test_a_row_of_wrong_types_is_reported_and_the_check_goes_on(check, tmp_path):
    said = [{"role": "user", "content": "<image>Where? <bbox>"}]
    said.append({"role": "assistant", "content": "There."})
    row = {"messages": said, "images": ["a.png"], "objects": {"ref": [], "bbox": [["10", 1, 2, 3]]}}
    sound = {"messages": [{"role": "user", "content": "Hi"}, said[1]]}
    source = write_jsonl(tmp_path / "swift.jsonl", row, sound)
    component = "dataset._component_=torchtune_qwen25vl.data.swift_dataset"
    code, report, printed = check(component, f"dataset.source={source}", "--preview=2")
    assert code == 1
    (bad,) = report["datasets"][0]["bad"]
    assert (
        "swift.jsonl, row 0: the row is not laid out as its format says: TypeError" in bad["error"]
    )
    first, second = printed.out.split("--- ")[1:]
    assert f"bad: {bad['error']}" in first
    assert "train | There." in second


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["dataset.source=gone.jsonl"], "gone.jsonl: no such file"),
        (["dataset.boxes=orginal"], "got 'orginal'"),
        (["dataset.mediaroot=x"], "'mediaroot'"),
        (["~dataset.source"], "'source'"),
        (["~tokenise"], "Could not find key tokenise"),
        (["dataset._component_=torch.utils.data.ChainDataset"], "ChainDataset"),
        (["dataset._component_=torchtune_qwen25vl.data.lava_dataset"], "lava_dataset"),
    ],
)
def test_a_check_that_cannot_run(check, arguments, match):
    code, report, printed = check(*arguments)
    assert code == 2
    assert not report
    assert match in printed.err


def test_configs_and_options_that_are_none(check, recipe, capsys):
    with pytest.raises(SystemExit, match="2"):
        check("--previw=1")
    assert "there are no options --previw=1" in capsys.readouterr().err
    cfg = OmegaConf.load(recipe)
    del cfg["dataset"]
    OmegaConf.save(cfg, recipe)
    code, _, printed = check()
    assert code == 2
    assert "has no dataset: section" in printed.err


def test_a_failed_run_keeps_the_report_there_is(check, tmp_path, monkeypatch):
    check()
    before = (tmp_path / "report" / "report.json").read_bytes()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("torchtune_qwen25vl.data.__main__.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        check()
    assert (tmp_path / "report" / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"optimizer": {"_component_": "torch.optim.AdamW"}}, ["vision"]),
        ({"optimizer": {"_component_": "torch.optim.AdamW"}, "precision": "fp32"}, []),
        ({"optimizer": {"_component_": "torchtune_qwen25vl.training.StochasticAdamW"}}, []),
        ({"optimizer": {"_component_": "torchao._AdamW", "bf16_stochastic_round": True}}, []),
        (
            {
                "optimizer": {"_component_": "torch.optim.SGD"},
                "parts": {"vision": {"train": "lora"}},
            },
            [],
        ),
    ],
)
def test_updates_that_training_would_round_away(check, recipe, changes, warned):
    cfg = OmegaConf.load(recipe)
    parts = {"vision": {"train": "full"}, "decoder": {"train": "lora"}}
    OmegaConf.save(OmegaConf.merge(cfg, {"parts": parts}, changes), recipe)
    code, _, printed = check()
    assert code == 0
    assert re.findall(r"WARNING: (\w+) has weights trained in bf16, where", printed.out) == warned


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--help"])
    shown = capsys.readouterr().out
    for word in ("CONFIG", "--preview", "--num-workers", "--report", "skip_bad_rows", "exit code"):
        assert word in shown


@pytest.mark.filterwarnings("ignore:.torchtune_qwen25vl.data.__main__. found:RuntimeWarning")
def test_as_a_command(recipe, tmp_path, monkeypatch):
    """`python -m torchtune_qwen25vl.data`, in this process: importing torch again takes long."""
    source = f"dataset.source={tmp_path / 'bad.jsonl'}"
    monkeypatch.setattr("sys.argv", ["data", "check", recipe, source, "--num-workers", "2"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("torchtune_qwen25vl.data", run_name="__main__")
    assert (tmp_path / "data-report" / "report.json").exists()


NAMED = "<|box_start|>(1,2)<|box_end|> <tool_call>"


@pytest.mark.parametrize("markup", ["text", "tokens"])
def test_names_of_tokens_in_answers_are_counted_and_shown(check, tmp_path, markup):
    rows = [talk("<|box_start|>?", "No."), talk("Where?", NAMED), talk("Hi", "Ho")]
    source = f"dataset.source={write_jsonl(tmp_path / 'named.jsonl', *rows)}"
    option = f"tokenizer.markup_in_answers={markup}"
    code, report, printed = check(source, option, "--preview", "2")
    assert code == 0
    (entry,) = report["datasets"]
    assert entry["rows_with_names_in_answers"] == 1
    assert entry["names_in_answers"] == ["<tool_call>", "<|box_end|>", "<|box_start|>"]
    assert "1 rows write <tool_call>, <|box_end|>, <|box_start|> in their answers" in printed.out
    shown = NAMED if markup == "tokens" else NAMED.replace("<", "\\<")
    assert f"train | {shown}<|im_end|>" in printed.out
    assert "\\<|box_start|>?<|im_end|>" in printed.out  # a question's is always text


def test_names_of_the_template_in_answers_are_bad_rows_as_tokens(check, tmp_path):
    rows = [talk("Hi", "Ho <|image_pad|>")]
    source = f"dataset.source={write_jsonl(tmp_path / 'named.jsonl', *rows)}"
    assert check(source)[0] == 0
    code, report, _ = check(source, "tokenizer.markup_in_answers=tokens")
    assert code == 1
    assert "row 0: with markup_in_answers" in report["datasets"][0]["bad"][0]["error"]
