"""Runs stages, clean and under faults, and says what came out."""

import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from parity.faults import FAULTS
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
    """

    fault: str
    stage: str
    error: float
    case: str = ""
    problem: str = ""

    @property
    def caught(self) -> bool:
        """Whether a measurement exceeded its tolerance by far."""
        return bool(self.case)

    @property
    def verdict(self) -> str:
        """Whether the fault was caught, was missed, or broke the stage."""
        return "caught" if self.caught else "broke" if self.problem else "missed"


@dataclass
class Outcome:
    """What one stage measured."""

    stage: Stage
    measurements: list[Measurement] = field(default_factory=list)
    control: Sighting | None = None  # None where the stage could not run
    problem: str = ""  # why it could not run
    seconds: float = 0.0

    @property
    def error(self) -> float:
        """Largest error of all cases."""
        return max((m.error for m in self.measurements), default=math.nan)

    @property
    def worst(self) -> Measurement | None:
        """The case that comes nearest to its tolerance, or exceeds it most."""
        return max(self.measurements, key=excess, default=None)

    @property
    def failed(self) -> list[Measurement]:
        """The cases that exceed their tolerance."""
        return [m for m in self.measurements if not m.error <= m.tolerance]

    @property
    def passed(self) -> bool:
        """Whether every case is within its tolerance, and the control was caught."""
        seen = self.control is not None and self.control.caught
        return bool(self.measurements) and not self.failed and seen and not self.problem


def excess(measurement: Measurement) -> float:
    """Error in units of the tolerance; inf for any error where the tolerance is 0."""
    if measurement.error == 0:
        return 0.0
    return measurement.error / measurement.tolerance if measurement.tolerance else math.inf


def is_caught(measurement: Measurement) -> bool:
    """Whether this error is one that nobody could take for noise."""
    return excess(measurement) > CONTROL_FACTOR


def run_stage(stage: Stage, setting: Setting, tick: Callable[[], object]) -> Outcome:
    """Measure all cases, then seed the control's fault until a case sees it."""
    outcome, start = Outcome(stage), time.perf_counter()
    try:
        for measurement in stage.measure(setting):
            outcome.measurements.append(measurement)
            tick()
    except Exception as error:
        outcome.problem = _in_words(error)
        traceback.print_exc()
    else:
        outcome.control = run_fault(stage, stage.fault, setting)
    outcome.seconds = time.perf_counter() - start
    return outcome


def run_fault(stage: Stage, name: str, setting: Setting) -> Sighting:
    """Show a fault to a stage, on its smallest models, up to the first case that sees it."""
    fault, largest = FAULTS[name], 0.0
    try:
        with fault.seed():
            for measurement in stage.measure(replace(setting, small=True, fault=fault)):
                if is_caught(measurement):
                    return Sighting(name, stage.name, measurement.error, measurement.case)
                largest = max(largest, measurement.error)
    except Exception as error:
        return Sighting(name, stage.name, largest, problem=_in_words(error))
    return Sighting(name, stage.name, largest)


def hunt(stages: Iterable[Stage], fault: str, setting: Setting) -> list[Sighting]:
    """Show one fault to these stages."""
    return [run_fault(stage, fault, setting) for stage in stages]


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
