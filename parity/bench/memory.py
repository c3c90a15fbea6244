"""How much memory a piece of work needs at its worst moment."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes in use at the worst moment of this work beyond those in use before, on Linux.

    This is what the system counts: also what the allocator keeps of what was given back to it.

    Raises:
        OSError: where the system keeps no peak that can be set back.
    """
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} keeps no peak of memory that can be set back")
    work()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free and not given back would not be counted
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
