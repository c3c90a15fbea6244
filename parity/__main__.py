"""`uv run parity`: every stage, its control, and a verdict."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from parity import bench, report
from parity.positions_table import positions_table
from parity.runner import run_stage
from parity.stages import STAGES, Setting

DESCRIPTION = """\
Compare torchtune_qwen25vl with Hugging Face transformers, stage by stage in the order of the data
flow. Every stage is run again under a seeded fault that it must see. Exit code 0 only when every
stage passed and every control was caught, else 1.
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--device", default="cpu", help="device of the models (default: cpu)")
    return parser.parse_args(arguments)


def run_stages(arguments: argparse.Namespace) -> int:
    """Run, print the table, write the reports."""
    setting = Setting(device=arguments.device, checkpoint=arguments.checkpoint)
    stages = [s for s in STAGES if not arguments.stage or s.name in arguments.stage]
    outcomes = []
    with tqdm(total=len(stages), unit="stage", file=sys.stderr) as bar:
        for stage in stages:
            bar.set_description(stage.name)
            outcomes.append(run_stage(stage, setting, bar.refresh))
            bar.update()
    print(report.table([report.row(outcome) for outcome in outcomes]))
    report.write(outcomes, arguments.report)
    print(f"\n{arguments.report / 'parity-report.html'} has the pictures.")
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        print(f"{len(failed)} stages failed; the first in the data flow: {failed[0].stage.name}")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `parity` command."""
    parsed = parse(arguments)
    if parsed.list:
        print(report.table([(s.name, s.what) for s in STAGES], ("stage", "what is compared")))
        return 0
    if parsed.positions:
        print(positions_table())
        return 0
    if parsed.bench:
        print(report.table([row.cells for row in bench.run(parsed.bench)], bench.COLUMNS))
        return 0
    return run_stages(parsed)


if __name__ == "__main__":
    sys.exit(main())
