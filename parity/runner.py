"""Runs stages, clean and under faults, and says what came out."""

import functools
import math
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from parity.deviations import Deviation, deviations_of
from parity.faults import FAULTS
from parity.faults.rules import RULES
from parity.stages import Measurement, Setting, Stage

CONTROL_FACTOR = 10  # a control must exceed its tolerance by this much, else the stage is blind


@dataclass(frozen=True)
class Sighting:
    """What one stage made of one fault.

    Attributes:
        fault: name of the fault
        stage: name of the stage
        error: that of the case that saw it, else the largest; inf where a shape differs
        case: the case that saw it
        problem: the exception that ended the stage; the fault then proves nothing
        is_theirs: this transformers makes the mistake itself, or a deviation of its own hides it
    """

    fault: str
    stage: str
    error: float
    case: str = ""
    problem: str = ""
    is_theirs: bool = False

    @property
    def caught(self) -> bool:
        """Whether a measurement exceeded its tolerance by far."""
        return bool(self.case)

    @property
    def verdict(self) -> str:
        """Whether the fault was caught, was missed, broke the stage, or is transformers' own."""
        if self.is_theirs:
            return "theirs"
        return "caught" if self.caught else "broke" if self.problem else "missed"

    @property
    def passed(self) -> bool:
        """Whether the fault was caught, or cannot be asked about here."""
        return self.caught or self.is_theirs


@dataclass
class Outcome:
    """What one stage measured."""

    stage: Stage
    measurements: list[Measurement] = field(default_factory=list)
    control: Sighting | None = None  # None where the stage could not run
    problem: str = ""  # why it could not run
    deviating: dict[str, Deviation] = field(default_factory=dict)  # by case
    seconds: float = 0.0

    @property
    def _ours(self) -> list[Measurement]:
        return [m for m in self.measurements if m.case not in self.deviating]

    @property
    def error(self) -> float:
        """Largest error of all cases but named deviations."""
        return max((m.error for m in self._ours), default=math.nan)

    @property
    def worst(self) -> Measurement | None:
        """The case that comes nearest to its tolerance, or exceeds it most."""
        return max(self._ours, key=excess, default=None)

    @property
    def failed(self) -> list[Measurement]:
        """The cases that exceed their tolerance and are no named deviation of transformers."""
        return [m for m in self._ours if not is_within(m)]

    @property
    def there(self) -> list[Measurement]:
        """The cases that this transformers could be asked about."""
        named = self.deviating
        return [m for m in self.measurements if m.case not in named or not named[m.case].is_absence]

    @property
    def passed(self) -> bool:
        """Whether every case is within its tolerance, and the control was caught.

        Where no case is there, nothing has passed.
        """
        seen = self.control is not None and self.control.passed
        return bool(self.there) and not self.failed and seen and not self.problem


def is_within(measurement: Measurement) -> bool:
    """Whether the error is within its tolerance; nan is not."""
    return measurement.error <= measurement.tolerance


def excess(measurement: Measurement) -> float:
    """Error in units of the tolerance; inf for any error where the tolerance is 0."""
    if measurement.error == 0:
        return 0.0
    return measurement.error / measurement.tolerance if measurement.tolerance else math.inf


def is_caught(measurement: Measurement) -> bool:
    """Whether this error is one that nobody could take for noise."""
    return excess(measurement) > CONTROL_FACTOR


def run_stage(stage: Stage, setting: Setting) -> Outcome:
    """Measure all cases, then seed the control's fault until a case sees it."""
    outcome, start = Outcome(stage), time.perf_counter()
    try:
        outcome.measurements.extend(stage.measure(setting))
    except Exception as error:
        outcome.problem = _in_words(error)
        traceback.print_exc()
    else:
        outcome.deviating = deviating(stage, setting)
        outcome.control = run_fault(stage, stage.fault, setting)
    outcome.seconds = time.perf_counter() - start
    return outcome


def run_fault(stage: Stage, name: str, setting: Setting) -> Sighting:
    """Show a fault to a stage, on its smallest models, up to the first case that sees it."""
    fault, largest, asked = FAULTS[name], 0.0, False
    small = replace(setting, small=True)
    try:
        theirs = deviating(stage, small)
        if any(name in (d.fault, *d.hides) for d in theirs.values()):
            return Sighting(name, stage.name, largest, is_theirs=True)
        with fault.seed():
            for measurement in stage.measure(replace(small, fault=fault)):
                if measurement.case in theirs:
                    continue
                asked = True
                if is_caught(measurement):
                    return Sighting(name, stage.name, measurement.error, measurement.case)
                largest = max(largest, measurement.error)
    except Exception as error:
        return Sighting(name, stage.name, largest, problem=_in_words(error))
    return Sighting(name, stage.name, largest, is_theirs=not asked)


@functools.cache
def deviating(stage: Stage, setting: Setting) -> dict[str, Deviation]:
    """The cases in which this transformers differs from ours exactly as a deviation says."""
    named = deviations_of(stage.name)
    if not named:
        return {}
    differs = [m for m in stage.measure(setting) if not is_within(m)]
    found = {m.case: d for d in named for m in differs if d.refuses(m.case, m.refusal)}
    compared = {m.case for m in differs if not m.refusal}
    for deviation in [d for d in named if d.fault]:
        fault = (FAULTS | RULES)[deviation.fault]
        with fault.seed():
            for measurement in stage.measure(replace(setting, fault=fault)):
                if measurement.case in compared and is_within(measurement):
                    found[measurement.case] = deviation
    return found


def hunt(stages: Iterable[Stage], fault: str, setting: Setting) -> list[Sighting]:
    """Show one fault to these stages."""
    return [run_fault(stage, fault, setting) for stage in stages]


def examine(stage: Stage, setting: Setting) -> tuple[Outcome, list[Sighting]]:
    """Run a stage, and show it every fault that it is to see, its control not again."""
    outcome = run_stage(stage, setting)
    seen = {outcome.control.fault: outcome.control} if outcome.control else {}
    faults = [name for name in FAULTS if FAULTS[name].stage == stage.name]
    return outcome, [seen.get(name) or run_fault(stage, name, setting) for name in faults]


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
