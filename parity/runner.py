"""Runs stages, clean and under their control, and says what came out."""

import math
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from parity.faults import FAULTS
from parity.stages import Measurement, Setting, Stage

CONTROL_FACTOR = 10  # a control must exceed its tolerance by this much, else the stage is blind


@dataclass
class Outcome:
    """What one stage measured."""

    stage: Stage
    measurements: list[Measurement] = field(default_factory=list)
    control: float = 0.0  # the control's largest error
    control_caught: bool = False
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
    def passed(self) -> bool:
        """Every case within its tolerance, and the control seen."""
        within = bool(self.measurements) and all(m.error <= m.tolerance for m in self.measurements)
        return within and self.control_caught and not self.problem


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
        outcome.problem = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    else:
        small = replace(setting, small=True)
        outcome.control, outcome.control_caught = run_fault(stage, stage.fault, small)
    outcome.seconds = time.perf_counter() - start
    return outcome


def run_fault(stage: Stage, fault: str, setting: Setting) -> tuple[float, bool]:
    """Error of this stage under a fault up to the first case that sees it, and whether one did.

    Code that stops with an error under the fault has seen it (error inf).
    """
    largest = 0.0
    with FAULTS[fault].seed():
        try:
            for measurement in stage.measure(setting):
                largest = max(largest, measurement.error)
                if is_caught(measurement):
                    return measurement.error, True
        except (ValueError, RuntimeError, AssertionError, IndexError):
            return math.inf, True
        except Exception:  # nothing that a fault explains
            traceback.print_exc()
            return math.nan, False
    return largest, False


@dataclass(frozen=True)
class Sighting:
    """What one stage made of one fault."""

    fault: str
    stage: str
    error: float
    caught: bool


def hunt(stages: Iterable[Stage], fault: str, setting: Setting) -> list[Sighting]:
    """Show one fault to these stages."""
    small = replace(setting, small=True)
    return [Sighting(fault, s.name, *run_fault(s, fault, small)) for s in stages]
