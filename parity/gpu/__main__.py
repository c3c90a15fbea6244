"""Prove and measure the port on one GPU: a table, then one line of JSON."""

import argparse
import json
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict

import torch

from parity import reference, report
from parity.gpu import _equal, _speed
from parity.gpu._figures import COLUMNS, TINY, TRUE, Figure, Sizes

PARTS = (
    *(_equal.tokens, _equal.packed, _equal.loss),
    *(_speed.inference, _speed.four_bits, _speed.steps, _equal.stages),
)


def main(words: list[str] | None = None) -> int:
    """Entry point: 0 if every part ran and every stage passed, else 1."""
    parser = argparse.ArgumentParser(prog=".gpu/run", description=__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="small models on the CPU: try the script"
    )
    parser.add_argument(
        "--seconds", type=float, default=450, help="begin nothing new after so long (default: 450)"
    )
    asked = parser.parse_args(words)
    if not (asked.tiny or torch.cuda.is_available()):
        print("there is no GPU here; --tiny tries the script on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if asked.tiny else "cuda")
    figures, problems = [], []
    for found in measured(device, TINY if asked.tiny else TRUE, seconds=asked.seconds):
        if isinstance(found, Figure):
            print("  ".join(found.cells), file=sys.stderr, flush=True)
            figures.append(found)
        else:
            problems.append(found)
    print(report.table([figure.cells for figure in figures], COLUMNS))
    for problem in problems:
        print(problem)
    lines = [asdict(figure) for figure in figures]
    print(json.dumps({"machine": machine(device), "figures": lines, "problems": problems}))
    return int(bool(problems) or any("FAILED" in figure.note for figure in figures))


def measured(device: torch.device, sizes: Sizes, *, seconds: float) -> Iterator[Figure | str]:
    """Yield figures as they come; in place of a part that broke or did not fit, why."""
    end = time.monotonic() + seconds
    for part in PARTS:
        try:
            for figure in part(device, sizes):
                yield figure
                if time.monotonic() > end:
                    yield f"{part.__name__}: not finished, the time is up"
                    break
        except Exception as error:
            traceback.print_exc()
            yield f"{part.__name__}: {type(error).__name__}: {error}".splitlines()[0]


def machine(device: torch.device) -> dict[str, str]:
    """Name the device and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = {"torch": torch.__version__, "transformers": reference.VERSION}
    return {"device": name, "python": platform.python_version(), **versions}


if __name__ == "__main__":
    sys.exit(main())
