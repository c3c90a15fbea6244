"""The harness itself: it must be able to fail."""

import inspect
import json
import math
import os
import shutil
import sys

import pytest
import torch

from parity import faults, in_two, reference, report, runner, trace, vocabulary
from parity.__main__ import main, parse
from parity.stages import STAGES, Measurement, Setting, Stage, generation
from parity.stages._stage import max_error

OURS = ("torchtune_qwen25vl", "parity.stages")


@pytest.fixture
def fault(monkeypatch):
    """A fault that does nothing; the stages of these tests look for it in their setting."""
    monkeypatch.setitem(faults.FAULTS, "seeded", faults.Fault("test"))
    return "seeded"


def stage(clean, faulty, fault, tolerance=0.0):
    def measure(setting):
        yield Measurement("only", faulty if setting.fault else clean, tolerance)

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
    outcome = runner.run_stage(stage(clean, faulty, fault, tolerance), Setting())
    assert outcome.passed == passes
    assert (report.verdict(outcome) == "passed") == passes


def test_a_stage_that_cannot_run_has_failed(fault):
    def measure(setting):
        yield Measurement("first", 0.0)
        raise OSError("no photos")

    broken = Stage("broken", "", "0", fault, measure)
    outcome = runner.run_stage(broken, Setting())
    assert not outcome.passed
    assert outcome.problem == "OSError: no photos"
    assert "no photos" in report.page([outcome], [])
    assert report.as_json([outcome], [])["passed"] is False


def test_a_stage_without_cases_has_failed(fault):
    empty = Stage("empty", "", "0", fault, lambda setting: iter(()))
    outcome = runner.run_stage(empty, Setting())
    assert not outcome.passed


@pytest.mark.parametrize("error", [ValueError, RuntimeError, AssertionError, KeyError])
def test_a_fault_that_breaks_a_stage_is_not_caught(fault, error):
    def measure(setting):
        yield Measurement("first", 5.0 if setting.fault else 0.0, tolerance=1.0)
        if setting.fault:
            raise error("placeholders do not match")

    outcome = runner.run_stage(Stage("s", "", "0", fault, measure), Setting())
    assert not outcome.passed
    assert outcome.control.verdict == "broke"
    assert "placeholders do not match" in outcome.control.problem
    assert report.verdict(outcome) == "control broke"
    assert report.as_json([outcome], [])["stages"][0]["control"]["verdict"] == "broke"


def test_what_is_measured_before_a_stage_breaks_counts(fault):
    def measure(setting):
        yield Measurement("first", 50.0 if setting.fault else 0.0, tolerance=1.0)
        raise AssertionError("not reached")

    sighting = runner.run_fault(Stage("s", "", "0", fault, measure), fault, Setting())
    assert (sighting.verdict, sighting.case, sighting.error) == ("caught", "first", 50.0)


def test_a_control_is_shown_once(fault):
    shown = []

    def measure(setting):
        shown.append(setting.fault)
        yield Measurement("only", 1.0 if setting.fault else 0.0)

    outcome, seen = runner.examine(Stage("test", "", "0", fault, measure), Setting())
    assert shown == [None, faults.FAULTS[fault]]
    assert seen == [outcome.control]
    assert outcome.passed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one process examines everything")
def test_what_is_random_is_examined_in_two_processes(fault):
    here = os.getpid()

    def measure(setting):
        yield Measurement("only", float(os.getpid() != here) + bool(setting.fault))

    stages = [Stage("test", "", "0", fault, measure)] * 3
    for setting, apart in ((Setting(), True), (Setting(checkpoint="a folder"), False)):
        examined = list(in_two.examined(stages, setting))
        assert [outcome.stage for outcome, _ in examined] == stages
        assert {outcome.error for outcome, _ in examined} == {float(apart)}
        assert [sighting.error for _, (sighting,) in examined] == 3 * [1.0 + apart]


def test_another_shape_is_a_measurement():
    assert max_error(torch.zeros(2), torch.zeros(3)) == math.inf
    assert max_error(torch.zeros(2), torch.full((2,), math.nan)) == math.inf


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
    monkeypatch.setattr("parity.__main__.STAGES", (stage(0.0, 0.0, fault),))
    assert main(["--report", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "0 of 1 seeded faults caught." in said
    assert "missed" in said


def test_every_fault_has_its_stage():
    names = {stage.name for stage in STAGES}
    assert len(faults.FAULTS) >= 20
    assert {fault.stage for fault in faults.FAULTS.values()} <= names


def built():
    """Our tiny model."""
    return trace.ours_like(reference.model("tiny"))


@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_changes_the_package_or_a_model_and_leaves_no_trace(name):
    """A name that is gone shows here, by the fault that hung on it."""
    fault, before = faults.FAULTS[name], state()
    model = built()
    fault.edit(model)
    with fault.seed():
        changed = state() != before
    assert changed == (fault.edit is faults.Fault("none").edit)
    assert state() == before


def state():
    """What the names of all our modules, and of their classes, stand for."""
    modules = {n: m for n, m in sys.modules.items() if n.startswith(OURS)}
    held = {(n, key): id(value) for n, m in modules.items() for key, value in vars(m).items()}
    classes = {
        value for m in modules.values() for value in vars(m).values() if inspect.isclass(value)
    }
    return held | {(c, key): id(v) for c in classes for key, v in vars(c).items()}


def test_an_attribute_that_is_gone_breaks_its_fault():
    model = built()
    del model.vision.full_attn_indices
    with pytest.raises(AttributeError, match="full_attn_indices"):
        faults.FAULTS["full attention in every layer"].edit(model)


def test_an_edit_changes_only_the_model_it_is_given():
    inputs = trace.inputs_for("image", "tiny")
    wrong, right = built(), trace.trace_ours(built(), inputs).logits
    faults.FAULTS["one-axis positions"].edit(wrong)
    assert not torch.equal(trace.trace_ours(wrong, inputs).logits, right)
    assert torch.equal(trace.trace_ours(built(), inputs).logits, right)


def sees(fault):
    """What the stage training makes of a fault."""
    (training,) = (stage for stage in STAGES if stage.name == "training")
    return runner.run_fault(training, fault, Setting())


@pytest.mark.parametrize(
    "fault",
    [
        *("one-axis positions", "labels shifted twice"),
        *("a frozen part trained", "first packed label kept"),
    ],
)
def test_training_sees_faults_of_positions_labels_and_parts(fault):
    assert sees(fault).verdict == "caught"


def test_padding_in_the_history_is_seen_by_its_own_case():
    (greedy,) = (stage for stage in STAGES if stage.name == "greedy tokens")
    sighting = runner.run_fault(greedy, "padding counts as repetition", Setting())
    assert sighting.case == "repetitions, padding a row would say"


def test_memory_that_is_read_before_it_is_written_shows():
    with generation.memory_of_nan():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_frozen_weights_that_move_are_measured():
    assert sees("a frozen part trained").case == "adapters and merger: frozen weights"


def test_training_sees_nothing_where_nothing_is_wrong(monkeypatch):
    monkeypatch.setitem(faults.FAULTS, "none", faults.Fault("training"))
    assert sees("none").verdict == "missed"


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
