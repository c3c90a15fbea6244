"""Versions of transformers: what one does otherwise is named exactly, or fails."""

import functools
import math
from dataclasses import replace

import pytest
import torch

from parity import deviations, faults, reference, report, runner, trace
from parity.deviations import DEVIATIONS, Deviation
from parity.faults.rules import RULES
from parity.stages import STAGES, Measurement, Setting, Stage
from parity.stages._stage import refused


def test_every_deviation_has_its_stage_and_its_fault():
    names = {stage.name for stage in STAGES}
    for deviation in DEVIATIONS:
        assert deviation.stage in names
        assert bool(deviation.fault) != bool(deviation.refusal)
        assert not deviation.fault or deviation.fault in faults.FAULTS | RULES
        assert bool(deviation.refusal) == bool(deviation.cases)
    assert RULES.keys() <= {deviation.fault for deviation in DEVIATIONS}


@pytest.mark.parametrize(
    "version", ["4.52.4", "4.57.6", "5.3.0", "5.6.0", "5.17.0", "5.23.0", "6.0"]
)
def test_a_version_has_one_rule_of_positions(version):
    assert len(deviations.deviations_of("positions", version)) == 1


@pytest.mark.parametrize("version", ["4.49.0", "4.51.3"])
def test_old_versions_follow_the_rule_of_positions(version):
    assert not deviations.deviations_of("positions", version)


@pytest.mark.parametrize(
    ("version", "holds"),
    [("5.2.9", False), ("5.3", True), ("5.3.0.dev0", True), ("5.10.1", True), ("5.18.0", False)],
)
def test_bounds_are_numbers(version, holds):
    assert Deviation("s", "5.3", "5.18", "", "").holds(version) == holds


def stage_of(errors, faulty):
    """A stage with these errors by case, and these under a fault."""

    def measure(setting):
        for case, error in (faulty if setting.fault else errors).items():
            yield Measurement(case, error)

    return Stage("test", "nothing", "0", "seeded", measure)


@pytest.fixture
def named(monkeypatch):
    """A deviation of the stage `test` that equals the fault `theirs`."""
    monkeypatch.setitem(faults.FAULTS, "theirs", faults.Fault("test"))
    monkeypatch.setitem(faults.FAULTS, "seeded", faults.Fault("test"))
    deviation = Deviation("test", "", "", "does it otherwise", "theirs")
    monkeypatch.setattr(deviations, "DEVIATIONS", (deviation,))
    return deviation


@pytest.mark.parametrize(
    ("errors", "faulty", "passes", "deviating"),
    [
        ({"a": 0.0, "b": 3.0}, {"a": 5.0, "b": 0.0}, True, {"b"}),  # exactly as named
        ({"a": 0.0, "b": 3.0}, {"a": 5.0, "b": 1.0}, False, set()),  # not exactly
        ({"a": 2.0, "b": 3.0}, {"a": 5.0, "b": 0.0}, False, {"b"}),  # and something else
        ({"a": 0.0, "b": 0.0}, {"a": 5.0, "b": 0.0}, True, set()),
    ],
)
def test_a_case_equals_ours_or_its_named_deviation(named, errors, faulty, passes, deviating):
    outcome = runner.run_stage(stage_of(errors, faulty), Setting())
    assert outcome.passed == passes
    assert set(outcome.deviating) == deviating


def test_a_case_that_deviates_anyway_catches_no_fault(named):
    blind = stage_of({"a": 0.0, "b": 3.0}, {"a": 0.0, "b": 0.0})
    assert runner.run_fault(blind, "seeded", Setting()).verdict == "missed"
    assert runner.run_fault(blind, "theirs", Setting()).verdict == "theirs"


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].stage == "positions"])
def test_a_rule_differs_from_ours_where_it_should(name):
    (positions,) = (stage for stage in STAGES if stage.name == "positions")
    with RULES[name].seed():
        errors = {m.case: m.error for m in positions.measure(Setting())}
    if name == "text resumes behind the grid":  # that of the installed transformers
        assert not any(errors.values())
    else:
        assert any(errors.values())
    assert torch.tensor(list(errors.values())).isfinite().all()


def test_windows_through_a_mask_are_the_same_attention_in_other_bits():
    inputs = trace.inputs_for("two images", "tiny")
    ours, rule = trace.ours_like(reference.model("tiny")), RULES["windows through a mask"]
    right = trace.trace_ours(ours, inputs).encoder
    with rule.seed():
        rule.edit(ours)
        masked = trace.trace_ours(ours, inputs).encoder
    assert 0 < (masked - right).abs().max() < 1e-5


def refusing(kinds):
    """A stage whose cases theirs refuses by these exceptions; "" for an equal case."""

    def measure(setting):
        for name, kind in kinds.items():
            error = math.inf if kind else 5.0 if setting.fault else 0.0
            refusal = kind and f"{kind}: it is too small"
            yield Measurement(f"{name}, default limits", error, refusal=refusal)

    return Stage("test", "nothing", "0", "seeded", measure)


@pytest.fixture
def named_refusal(named, monkeypatch):
    """A deviation of the stage `test` that refuses the cases "1 x 1" by a ValueError."""
    deviation = replace(named, fault="", refusal="ValueError", cases=("1 x 1",))
    monkeypatch.setattr(deviations, "DEVIATIONS", (deviation,))


@pytest.mark.parametrize(
    ("kinds", "passes"),
    [
        ({"1 x 1": "ValueError", "2 x 2": ""}, True),  # exactly as named
        ({"1 x 1": "", "2 x 2": ""}, True),  # equal to ours
        ({"1 x 1": "TypeError", "2 x 2": ""}, False),  # another exception
        ({"1 x 1": "ValueError", "2 x 2": "ValueError"}, False),  # another case
        ({"1 x 11": "ValueError", "2 x 2": ""}, False),  # a case whose name begins the same way
    ],
)
def test_a_refusal_is_named_by_case_and_exception(named_refusal, kinds, passes):
    outcome = runner.run_stage(refusing(kinds), Setting())
    assert outcome.passed == passes
    assert not outcome.problem
    shown = report.as_json([outcome], [])["stages"][0]["cases"]
    assert [case["refusal"].partition(":")[0] for case in shown] == list(kinds.values())
    assert ("too small" in report.verdict(outcome)) != passes


@pytest.mark.parametrize(
    ("kinds", "verdict"),
    [
        ({"1 x 1": "NotThereError", "2 x 2": ""}, "passed, 1 not there"),
        ({"1 x 1": "NotThereError"}, "not there"),  # nothing was compared, so nothing passed
    ],
)
def test_what_is_not_there_has_not_passed(named, monkeypatch, kinds, verdict):
    absence = replace(named, fault="", refusal="NotThereError", cases=("1 x 1",))
    monkeypatch.setattr(deviations, "DEVIATIONS", (absence,))
    outcome = runner.run_stage(refusing(kinds), Setting())
    assert report.verdict(outcome) == verdict
    assert outcome.passed == verdict.startswith("passed")


def refusing_small_images(kind):
    """Their image processor as of 4.52, which refuses a side below 28 pixels."""
    right = reference.image_processor

    def make(**options):
        processor = right(**options)

        def process(image, **kwargs):
            if min(image.size) < 28:
                raise kind("must be larger than factor:28")
            return processor(image, **kwargs)

        return process

    return make


@pytest.mark.parametrize(("kind", "passes"), [(ValueError, True), (TypeError, False)])
def test_small_images_are_refused_as_4_52_does(monkeypatch, kind, passes):
    (pixels,) = (stage for stage in STAGES if stage.name == "pixels")
    known = functools.partial(deviations.deviations_of, version="4.52.4")
    monkeypatch.setattr(runner, "deviations_of", known)
    monkeypatch.setattr(reference, "image_processor", refusing_small_images(kind))
    stage = replace(pixels, what=f"refused by {kind.__name__}")  # what was found before is kept
    outcome = runner.run_stage(stage, Setting(small=True))
    assert outcome.passed == passes
    refusals = {m.case.split(", ")[0] for m in outcome.measurements if m.refusal}
    assert refusals == {"1 x 1", "13 x 300", "ratio 200"}


def test_only_what_theirs_raises_is_a_refusal():
    with pytest.raises(reference.RefusalError, match=r"ValueError: .*'no'") as caught:
        reference.ask(int, "no")
    assert refused("a case", caught.value).refusal == str(caught.value)
    assert reference.ask(int, "7") == 7


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("model.visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("model.language_model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_of_old_versions_become_those_of_new_ones(old, new):
    assert reference.since_4_52(old) == new


class BeforeTheirLossTookNumbers(torch.nn.Module):
    """Their model, whose forward takes the labels of a batch but not their number in a step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids, attention_mask, position_ids, labels, pixel_values, image_grid_thw
    ):
        named = {name: value for name, value in locals().items() if name != "self"}
        return self.model(**named)


def test_a_step_has_one_loss_whether_the_model_knows_its_labels_or_not():
    model, inputs = reference.model("tiny"), trace.inputs_for("two images", "tiny")
    with torch.no_grad():
        new = reference.step_loss(model, inputs, 37)
        old = reference.step_loss(BeforeTheirLossTookNumbers(model), inputs, 37)
        own = model(**reference.forward_kwargs(inputs), labels=inputs.labels).loss
    assert float(old) == pytest.approx(float(new), rel=1e-6)
    assert float(new) == pytest.approx(float(own) * 8 / 37, rel=1e-6)  # eight are labelled
