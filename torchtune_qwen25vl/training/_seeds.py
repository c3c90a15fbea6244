"""One seed of several numbers: whatever is drawn follows from what it is drawn for."""

import numpy as np


def seed_of(*numbers: int) -> int:
    """Make one seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
