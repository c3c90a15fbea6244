"""Versions of transformers: what one does otherwise is named exactly, or fails."""

import pytest
import torch

from parity import deviations, faults, runner
from parity.deviations import DEVIATIONS, Deviation
from parity.faults.rules import RULES
from parity.stages import STAGES, Measurement, Setting, Stage


def test_every_deviation_has_its_stage_and_its_fault():
    names = {stage.name for stage in STAGES}
    for deviation in DEVIATIONS:
        assert deviation.stage in names
        assert deviation.fault in faults.FAULTS | RULES
    assert RULES.keys() <= {deviation.fault for deviation in DEVIATIONS}


@pytest.mark.parametrize(
    "version", ["4.49.0", "4.57.6", "5.3.0", "5.6.0", "5.17.0", "5.23.0", "6.0"]
)
def test_a_version_has_one_rule_of_positions(version):
    assert len(deviations.deviations_of("positions", version)) == 1


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
    outcome = runner.run_stage(stage_of(errors, faulty), Setting(), lambda: None)
    assert outcome.passed == passes
    assert set(outcome.deviating) == deviating


def test_a_case_that_deviates_anyway_catches_no_fault(named):
    blind = stage_of({"a": 0.0, "b": 3.0}, {"a": 0.0, "b": 0.0})
    assert runner.run_fault(blind, "seeded", Setting()).verdict == "missed"
    assert runner.run_fault(blind, "theirs", Setting()).verdict == "theirs"


@pytest.mark.parametrize("name", RULES)
def test_a_rule_differs_from_ours_where_it_should(name):
    (positions,) = (stage for stage in STAGES if stage.name == "positions")
    with RULES[name].seed():
        errors = {m.case: m.error for m in positions.measure(Setting())}
    if name == "text resumes behind the grid":  # that of the installed transformers
        assert not any(errors.values())
    else:
        assert any(errors.values())
    assert torch.tensor(list(errors.values())).isfinite().all()
