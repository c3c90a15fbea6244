"""The recipe finetune that is stopped, lengthened, moved, exported, or cannot go on."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import tiny_folder
import torch
from finetune_runs import config, logged, losses
from omegaconf import OmegaConf
from safetensors.torch import load_file
from training_on_ranks import RECIPE, recipe, run

from parity import reference
from torchtune_qwen25vl.training import Stopped, _ends

CONSTANT = {"_component_": "training_on_ranks.constant"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as transformers saves it."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    reference.random_model("tiny").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A tiny model that has a tokenizer."""
    return tiny_folder.write_folder(tmp_path_factory.mktemp("reading") / "model", tied=True)


def simple(folder, output_dir, **changes):
    """A YAML without validation, of 4 steps of 4 samples."""
    quiet = {"val_dataset": None, "eval_every_n_steps": None, "max_steps": 4}
    return config(folder, output_dir, **{**quiet, **changes})


def of_rows(folder, output_dir, rows, **changes):
    """The same on rows of text."""
    cfg = simple(folder, output_dir, pack_to=None, **changes)
    cfg.parts.vision = cfg.parts.merger = {"train": "frozen"}
    cfg.tokenizer = {
        "_component_": "torchtune_qwen25vl.Qwen25VLTransform",
        "path": "${model_dir}/tokenizer.json",
    }
    cfg.dataset = {"_component_": "torchtune_qwen25vl.data.llava_dataset", "source": str(rows)}
    return cfg


def write_rows(path, answers):
    turns = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": text}] for text in answers]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    return path


def test_a_lengthened_run_has_the_new_rates_from_its_first_step(folder, tmp_path):
    run(simple(folder, tmp_path / "long", max_steps=6))
    run(simple(folder, tmp_path / "short", max_steps=3))
    run(simple(folder, tmp_path / "short", max_steps=6))
    long, lengthened = (logged(tmp_path / name) for name in ("long", "short"))
    rates = {step: figures["lr_decoder"] for step, figures in long.items()}
    for step in (4, 5, 6):
        assert lengthened[step]["lr_decoder"] == rates[step] > 0


def test_sigterm_saves_a_checkpoint_from_which_a_run_goes_on(folder, tmp_path, monkeypatch):
    whole = simple(folder, tmp_path / "whole", save_every_n_steps=None)
    run(whole)
    cfg = simple(folder, tmp_path / "stopped", save_every_n_steps=None)
    flagship = recipe().FinetuneRecipe(cfg)
    flagship.setup()
    step = flagship.take_step

    def is_told_to_stop(loader):
        if flagship.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loader)

    monkeypatch.setattr(flagship, "take_step", is_told_to_stop)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 2 of 4, with a checkpoint"):
        flagship.train()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (tmp_path / "stopped" / "step_2").is_dir()
    run(cfg)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_run_goes_on_without_a_row_that_turned_bad(reading, tmp_path):
    """Every other row is seen when it would have been; only its step has fewer labels."""
    rows = write_rows(tmp_path / "rows.jsonl", ["red " * n for n in range(1, 17)])
    whole = of_rows(reading, tmp_path / "whole", rows, shuffle=False)
    run(whole)
    cfg = of_rows(reading, tmp_path / "cut", rows, shuffle=False)
    cfg.max_steps = 2
    cfg.lr_scheduler = whole.lr_scheduler = CONSTANT
    flagship = run(cfg)
    bad = [{"row": 9, "digest": flagship.dataset.rows.digest(9)}]
    report = {"datasets": [{"source": str(rows), "rows": 16, "bad": bad}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    cfg.dataset.skip_bad_rows, cfg.max_steps = str(tmp_path / "report.json"), 4
    again = run(cfg)
    assert again.walk.empty == (9,)
    labels = [
        [figures["labels"] for figures in logged(tmp_path / name).values()]
        for name in ("whole", "cut")
    ]
    row = sum(label != -100 for label in flagship.dataset[9]["labels"])
    assert [a - b for a, b in zip(*labels, strict=True)] == [0, 0, row, 0]
    assert row > 9
    del cfg.dataset.skip_bad_rows
    assert recipe().FinetuneRecipe(cfg).setup() is None  # it was good when the run began


def test_rows_that_come_back_are_another_run(reading, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ["red " * n for n in range(1, 9)])
    cfg = of_rows(reading, tmp_path / "out", rows, max_steps=1, lr_scheduler=CONSTANT)
    report = {"datasets": [{"source": str(rows), "rows": 8, "bad": []}]}
    digest = recipe().FinetuneRecipe(cfg)
    digest.setup()
    report["datasets"][0]["bad"] = [{"row": 3, "digest": digest.dataset.rows.digest(3)}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    cfg.dataset.skip_bad_rows = str(tmp_path / "report.json")
    run(cfg)
    del cfg.dataset.skip_bad_rows
    with pytest.raises(ValueError, match=r"'rows left out': \(\[3\], \[\]\)"):
        recipe().FinetuneRecipe(cfg).setup()


def test_rows_that_changed_are_another_run(reading, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", ["red", "blue", "green", "yellow"])
    cfg = of_rows(reading, tmp_path / "out", rows, max_steps=1, lr_scheduler=CONSTANT)
    run(cfg)
    write_rows(rows, ["red", "blue", "green", "yellow "])
    with pytest.raises(ValueError, match=r"\(then, now\) \{'rows': \('"):
        recipe().FinetuneRecipe(cfg).setup()


def test_a_model_folder_may_move_but_not_change(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    cfg = simple(tmp_path / "model", tmp_path / "out", max_steps=1, lr_scheduler=CONSTANT)
    run(cfg)
    (tmp_path / "model").rename(tmp_path / "moved")
    cfg.model_dir = str(tmp_path / "moved")
    same = recipe().FinetuneRecipe(cfg)
    same.setup()
    assert same.step == 1
    weights = tmp_path / "moved" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-(len(content) // 2) :] = bytes(len(content) // 2)
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"\(then, now\) \{'source': \('"):
        recipe().FinetuneRecipe(cfg).setup()


def test_any_step_can_be_exported(folder, tmp_path):
    cfg = simple(folder, tmp_path / "out", max_steps=4, lr_scheduler=CONSTANT)
    run(cfg)
    last = load_file(tmp_path / "out" / "model" / "model.safetensors")
    flagship = recipe().FinetuneRecipe(cfg)
    assert flagship.export("step_2") == tmp_path / "out" / "model"
    exported = load_file(tmp_path / "out" / "model" / "model.safetensors")
    short = simple(folder, tmp_path / "short", max_steps=2, lr_scheduler=CONSTANT)
    run(short)
    expected = load_file(tmp_path / "short" / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert any(not torch.equal(exported[name], last[name]) for name in last)
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4], "it trained"
    with pytest.raises(ValueError, match=r"holds \['step_2', 'step_4'\] and not 'step_3'; name o"):
        flagship.export("step_3")
    other = shutil.copytree(folder, tmp_path / "other") / "config.json"
    other.write_text(other.read_text() + "\n")
    changes = {
        "tuning": {"adapters.lora_alpha": 5},
        "source": {"model_dir": str(other.parent)},
        "from_scratch": {"from_scratch": True},
    }
    for name, change in changes.items():
        changed = OmegaConf.merge(
            cfg, OmegaConf.from_dotlist([f"{k}={v}" for k, v in change.items()])
        )
        with pytest.raises(ValueError, match=rf"\(then, now\) \{{'{name}': \("):
            recipe().FinetuneRecipe(changed).export("step_2")


def test_what_the_user_can_mend_is_one_line_and_exit_code_2(folder, tmp_path):
    cfg = simple(folder, tmp_path / "out", export="step_9")
    OmegaConf.save(cfg, tmp_path / "my.yaml")
    command = [str(RECIPE), "--config", str(tmp_path / "my.yaml")]
    for words, line in (([], "export names a checkpoint"), (["seed=one"], "seed is a whole numb")):
        code, said = forked.run_command(as_main, [*command, *words], tmp_path / line)
        assert code == 2, said
        assert [one for one in said.splitlines() if line in one]
        assert "Traceback" not in said


def as_main(words):
    """Run a file as Python does that is given these words."""
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as done:
        return done.code
    return 0


def test_an_output_folder_that_cannot_be_is_refused_before_the_logger(folder, tmp_path):
    (tmp_path / "file").touch()
    flagship = recipe().FinetuneRecipe(simple(folder, tmp_path / "file"))
    flagship.settings.tokenizer["_component_"] = "nowhere.t"  # which comes later
    with pytest.raises(FileExistsError, match="file"):
        flagship.setup()


def raises(error):
    def recipe():
        raise error

    return recipe


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("it is wrong;\n  mend it"), 2, "it is wrong; mend it"),
        (OSError(28, "no space"), 2, "[Errno 28] no space"),
        (
            ValueError("Caught ValueError in DataLoader worker process 0.\nTrace\nValueError: bad"),
            2,
            "bad",
        ),
        (Stopped(3, 9), 143, "stopped by SIGTERM after step 3 of 9"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    ],
)
def test_an_end_in_one_line(error, code, line, capsys):
    assert _ends.in_one_line(raises(error)) == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_faults_of_ours_keep_their_traceback():
    with pytest.raises(AssertionError):
        _ends.in_one_line(raises(AssertionError("ours")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_without_cuda_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cannot use cuda, it finds no accelerator: .*device=cpu"):
        recipe().FinetuneRecipe(simple(folder, tmp_path, device="cuda"))


def test_a_row_that_a_worker_cannot_read_ends_the_run(reading, tmp_path):
    """In one line, though workers outlive the signals by which Python ends its children."""
    rows = write_rows(tmp_path / "rows.jsonl", ["red"] * 40)
    lines = rows.read_text().splitlines()
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "red"}]
    lines[17] = json.dumps({"image": "gone.png", "conversations": turns})  # the plan reads others
    rows.write_text("\n".join(lines) + "\n")
    cfg = of_rows(reading, tmp_path / "out", rows, shuffle=False, dataloader={"num_workers": 1})
    cfg.max_steps, cfg.lr_scheduler = 8, CONSTANT
    OmegaConf.save(cfg, tmp_path / "run.yaml")
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(RECIPE.parents[1]), tests))}
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--config", str(tmp_path / "run.yaml")],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "gone.png" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert losses(tmp_path / "out").keys() <= {1, 2, 3, 4}


def test_a_word_that_reaches_into_a_list_is_told_in_one_line(monkeypatch, capsys):
    words = ["rewards.0.column=answer", "loss.beta=0.1"]
    monkeypatch.setattr(sys, "argv", ["policy.py", *words])
    cfg = OmegaConf.create({"rewards": [{"column": "a"}]})

    def merges():
        OmegaConf.merge(cfg, OmegaConf.from_dotlist(words))

    assert _ends.in_one_line(merges) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "as in rewards=[...], got rewards.0.column=answer; write it whole" in line
    with pytest.raises(TypeError, match="ours"):
        _ends.in_one_line(raises(TypeError("ours")))
