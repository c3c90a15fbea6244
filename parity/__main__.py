"""`uv run parity`: every stage, its control, and a verdict."""

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from parity import bench, report
from parity.deviations import DEVIATIONS
from parity.faults import FAULTS
from parity.in_two import examined
from parity.positions_table import positions_table
from parity.runner import Outcome, Sighting, hunt
from parity.serve import ask_folder
from parity.stages import STAGES, Setting

DESCRIPTION = """\
Compare torchtune_qwen25vl with Hugging Face transformers, stage by stage in the order of the data
flow. Every stage is run again under a seeded fault that it must see. Exit code 0 only when every
stage passed and every control was caught, else 1.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="parity", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--stage",
        action="append",
        choices=[stage.name for stage in STAGES],
        metavar="NAME",
        help="run this stage only; may be given several times",
    )
    parser.add_argument("--list", action="store_true", help="list the stages and stop")
    parser.add_argument(
        "--bench", choices=bench.BENCHES, help="measure speed and memory instead: %(choices)s"
    )
    parser.add_argument(
        "--peer",
        choices=["vllm"],
        help="with --bench captioning, measure ours against vLLM too",
    )
    parser.add_argument(
        "--faults",
        action="store_true",
        help="show every seeded fault to every stage and print which ones see it",
    )
    parser.add_argument(
        "--deviations",
        action="store_true",
        help="show what versions of transformers do otherwise, and the faults that equals",
    )
    parser.add_argument(
        "--positions",
        action="store_true",
        help="show where the installed transformers leaves Qwen's rule for positions",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where parity-report.json and parity-report.html go (default: here)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a Qwen2.5-VL folder or hub id to run on, in place of random weights and default\n"
        "processor settings",
    )
    parser.add_argument(
        "--serve",
        type=Path,
        metavar="FOLDER",
        help="say where the answers of a model folder part from vLLM's, and stop",
    )
    parser.add_argument(
        "--url",
        help="with --serve, an OpenAI-compatible server of that folder; without it vLLM gets an\n"
        "environment of its own, 6 GB, and is run here",
    )
    parser.add_argument("--device", default="cpu", help="device of the models (default: cpu)")
    return parser.parse_args(arguments)


def run_stages(arguments: argparse.Namespace) -> int:
    """Run stages and their faults, print the table, write the reports; return the exit code."""
    setting = Setting(device=arguments.device, checkpoint=arguments.checkpoint)
    stages = [s for s in STAGES if not arguments.stage or s.name in arguments.stage]
    outcomes: list[Outcome] = []
    sightings: list[Sighting] = []
    with tqdm(total=len(stages), unit="stage", file=sys.stderr) as bar:
        for outcome, seen in examined(stages, setting):
            outcomes.append(outcome)
            sightings += seen
            bar.update()
    print(report.table([report.row(outcome) for outcome in outcomes]))
    report.write(outcomes, sightings, arguments.report)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        print(f"{len(failed)} stages failed; the first in the data flow: {failed[0].stage.name}")
    asked = [sighting for sighting in sightings if not sighting.is_theirs]
    missed = [sighting for sighting in asked if not sighting.caught]
    print(f"\n{len(asked) - len(missed)} of {len(asked)} seeded faults caught.")
    if missed:
        print(report.table([report.fault_row(s) for s in missed], report.FAULT_COLUMNS))
    if any(math.isinf(s.error) for s in sightings):
        print(f"{report.INFINITE}.")
    print(f"{arguments.report / 'parity-report.html'} has the pictures.")
    return 1 if failed or missed else 0


def run_faults(arguments: argparse.Namespace) -> int:
    """Show every fault to every stage; print which stages see it, and with what error."""
    setting = Setting(device=arguments.device, checkpoint=arguments.checkpoint)
    stages = [s for s in STAGES if not arguments.stage or s.name in arguments.stage]
    rows, missed = [], []
    for fault in tqdm(FAULTS, unit="fault", file=sys.stderr):
        seen = [sighting for sighting in hunt(stages, fault, setting) if sighting.caught]
        rows.append((fault, ", ".join(f"{s.stage} ({s.error:.1e})" for s in seen) or "NOBODY"))
        missed += [] if seen else [fault]
    print(report.table(rows, ("fault", "seen by (error)")))
    return 1 if missed else 0


def run_bench(name: str, peer: str | None) -> int:
    """Print every row as soon as it is measured, then all of them as a table."""
    rows = []
    columns, lines = bench.run(name, peer)
    for row in tqdm(lines, "measuring", unit=" rows"):
        rows.append(row.cells)
        tqdm.write("  ".join(row.cells), file=sys.stderr)
    print(report.table(rows, columns))
    return 0


def run_serve(arguments: argparse.Namespace) -> int:
    """Ask ours and vLLM about a folder; what cannot be asked is said in one line."""
    try:
        return ask_folder(arguments.serve, arguments.url)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def main(arguments: list[str] | None = None) -> int:
    """Run the `parity` command and return its exit code."""
    parsed = parse(arguments)
    for given, wanted, goes_with in (
        ("url", parsed.serve, "--serve FOLDER"),
        ("peer", parsed.bench == "captioning", "--bench captioning"),
    ):
        if getattr(parsed, given) and not wanted:
            print(f"--{given} goes with {goes_with}: leave it out, or add that", file=sys.stderr)
            return 2
    if not parsed.bench:
        torch.set_num_threads(1)  # small models: threads would wait for each other, and sums move
    if parsed.list:
        print(report.table([(s.name, s.what) for s in STAGES], ("stage", "what is compared")))
        return 0
    if parsed.faults:
        return run_faults(parsed)
    if parsed.deviations:
        rows = [report.deviation_row(deviation) for deviation in DEVIATIONS]
        print(report.table(rows, report.DEVIATION_COLUMNS))
        return 0
    if parsed.positions:
        print(positions_table())
        return 0
    if parsed.bench:
        return run_bench(parsed.bench, parsed.peer)
    if parsed.serve:
        return run_serve(parsed)
    return run_stages(parsed)


if __name__ == "__main__":
    sys.exit(main())
