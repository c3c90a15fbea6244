"""The harness itself: it must be able to fail."""

import contextlib
import json
import math
import shutil

import pytest
import torch

from parity import faults, reference, report, runner, vocabulary
from parity.__main__ import main, parse
from parity.stages import STAGES, Measurement, Setting, Stage

WRONG = {"on": False}


@pytest.fixture
def fault(monkeypatch):
    """A fault that sets a flag, so that a stage of the tests can see it."""

    @contextlib.contextmanager
    def seeded():
        WRONG["on"] = True
        yield
        WRONG["on"] = False

    monkeypatch.setitem(faults.FAULTS, "seeded", faults.Fault(seeded, "test"))
    return "seeded"


def stage(clean, faulty, fault, tolerance=0.0):
    def measure(setting):
        yield Measurement("only", faulty if WRONG["on"] else clean, tolerance)

    return Stage("test", "nothing", "0", fault, measure)


@pytest.mark.parametrize(
    ("clean", "faulty", "tolerance", "passes"),
    [
        (0.0, 1.0, 0.0, True),
        (1e-9, 1.0, 0.0, False),  # an error where none is allowed
        (0.0, 0.0, 0.0, False),  # a blind stage
        (5e-6, 1e-3, 1e-5, True),
        (2e-5, 1e-3, 1e-5, False),
        (5e-6, 9e-5, 1e-5, False),  # a control that is less than ten tolerances away
        (math.nan, 1.0, 1e-5, False),
        (math.inf, 1.0, 1e-5, False),
    ],
)
def test_verdict(fault, clean, faulty, tolerance, passes):
    outcome = runner.run_stage(stage(clean, faulty, fault, tolerance), Setting(), lambda: None)
    assert outcome.passed == passes
    assert (report.verdict(outcome) == "passed") == passes


def test_a_stage_that_cannot_run_has_failed(fault):
    def measure(setting):
        yield Measurement("first", 0.0)
        raise OSError("no photos")

    broken = Stage("broken", "", "0", fault, measure)
    outcome = runner.run_stage(broken, Setting(), lambda: None)
    assert not outcome.passed
    assert outcome.problem == "OSError: no photos"
    assert "no photos" in report.page([outcome], [])
    assert report.as_json([outcome], [])["passed"] is False


def test_a_stage_without_cases_has_failed(fault):
    outcome = runner.run_stage(
        Stage("empty", "", "0", fault, lambda setting: iter(())), Setting(), lambda: None
    )
    assert not outcome.passed


def test_code_that_stops_under_the_fault_has_seen_it(fault):
    def measure(setting):
        if WRONG["on"]:
            raise ValueError("placeholders do not match")
        yield Measurement("only", 0.0)

    outcome = runner.run_stage(Stage("s", "", "0", fault, measure), Setting(), lambda: None)
    assert outcome.passed
    assert outcome.control == math.inf


def test_command_writes_both_reports_and_its_exit_code(tmp_path, monkeypatch, fault, capsys):
    good, bad = stage(0.0, 1.0, fault), stage(1.0, 1.0, fault)
    monkeypatch.setattr("parity.__main__.STAGES", (good,))
    assert main(["--report", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "parity-report.json").read_text())
    assert written["passed"] is True
    assert "<table>" in (tmp_path / "parity-report.html").read_text()
    monkeypatch.setattr("parity.__main__.STAGES", (good, bad))
    assert main(["--report", str(tmp_path)]) == 1
    assert "failed: only" in capsys.readouterr().out


def test_a_missed_fault_fails_the_run(tmp_path, monkeypatch, fault, capsys):
    monkeypatch.setattr("parity.__main__.STAGES", (stage(0.0, 1.0, fault),))
    unseen = faults.Fault(contextlib.nullcontext, "test")
    monkeypatch.setitem(faults.FAULTS, "unseen", unseen)
    assert main(["--report", str(tmp_path)]) == 1
    assert "1 of 2 seeded faults caught. unseen" in capsys.readouterr().out


def test_every_fault_has_its_stage():
    names = {stage.name for stage in STAGES}
    assert len(faults.FAULTS) >= 20
    assert {fault.stage for fault in faults.FAULTS.values()} <= names


def sees(fault):
    """Error under a fault, and whether the smallest setting of the stage training caught it."""
    (training,) = (stage for stage in STAGES if stage.name == "training")
    return runner.run_fault(training, fault, Setting(small=True))


@pytest.mark.parametrize(
    "fault",
    [
        *("one-axis positions", "labels shifted twice"),
        *("a frozen part trained", "first packed label kept"),
    ],
)
def test_training_sees_faults_of_positions_labels_and_parts(fault):
    error, caught = sees(fault)
    assert caught, error


def test_training_sees_nothing_where_nothing_is_wrong(monkeypatch):
    monkeypatch.setitem(faults.FAULTS, "none", faults.Fault(contextlib.nullcontext, "training"))
    error, caught = sees("none")
    assert not caught, error


def test_every_stage_names_a_fault_and_explains_its_tolerance():
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for each in STAGES:
        assert each.fault in faults.FAULTS
        assert each.what
        assert each.tolerance


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(["--stage", "no such stage"])
    assert "no such stage" in capsys.readouterr().err


def write_with_real_vocabulary(folder):
    """A random bf16 model as transformers saves it, with Qwen's ids, tokenizer and NF4's blocks."""
    config = reference.config("tied").to_dict()
    for name in reference.IDS:  # as image_token_id or vision_start_token_id
        word = name.removesuffix("_token_id")
        token = word if word.startswith("vision") else f"{word}_pad"
        config[name] = vocabulary.QWEN2_5_SPECIAL_TOKENS[f"<|{token}|>"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config["text_config"] |= {
        "vocab_size": 151936,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "rope_parameters": rope,
    }
    config["vision_config"] |= {"out_hidden_size": 256}
    model = reference.Qwen2_5_VLForConditionalGeneration(
        reference.Qwen2_5_VLConfig.from_dict(config)
    )
    reference.randomise(model, seed=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in vocabulary.real().iterdir():
        shutil.copy(path, folder)
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    return folder


@pytest.mark.slow
def test_a_folder_of_theirs_passes_every_stage(tmp_path):
    folder = write_with_real_vocabulary(tmp_path / "model")
    assert main(["--checkpoint", str(folder), "--report", str(tmp_path)]) == 0
