"""Every stage, in the order in which data flows: the first that diverges names the fault."""

from parity.stages._stage import Measurement, Setting, Stage
from parity.stages.positions import POSITIONS, WINDOW_ORDER

STAGES: tuple[Stage, ...] = (POSITIONS, WINDOW_ORDER)

__all__ = ["STAGES", "Measurement", "Setting", "Stage"]
