"""`python -m torchtune_qwen25vl.hidden_states show|probe FOLDER`: look into recorded states."""

import argparse
import json
import re
import sys

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl.hidden_states._probe import WRONG, as_report, as_table, probe, write_picture
from torchtune_qwen25vl.hidden_states._show import describe, describe_sample
from torchtune_qwen25vl.hidden_states._states import open_states
from torchtune_qwen25vl.jobs import as_path

PROBE = f"""\
Fit a logistic probe for a label on each selector that was recorded, and test it on images that it
has not seen: stratified folds, all rows of an image in one of them. AUROC is told with its standard
deviation over the folds, beside that of labels that were shuffled, which must be at chance, 0.5.

  label=COLUMN        a column of the table, of two values or more
  label={WRONG}  whether the model's answer is another than the table's

Written to the folder: probe-LABEL.json, and with matplotlib (the extra plots) probe-LABEL.png.
Needs scikit-learn, of the extra states.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m torchtune_qwen25vl.hidden_states")
    commands = parser.add_subparsers(required=True, metavar="command")
    what = "say what a folder of states holds"
    show = commands.add_parser("show", help=what, description=what)
    show.add_argument("folder", help="output folder of hidden-states, or one of HALP's files")
    show.add_argument("--detailed", action="store_true", help="name failed rows and other columns")
    show.add_argument("--sample", metavar="ID", help="say all there is about one row")
    show.set_defaults(run=_show)
    what = "say how well a linear probe reads a label from each selector"
    fit = commands.add_parser("probe", help=what, description=PROBE, formatter_class=raw)
    fit.add_argument("folder", help="output folder of hidden-states")
    fit.add_argument("label", metavar="label=COLUMN", type=_label)
    fit.add_argument("--seed", type=int, default=0, help="of folds and shuffled labels")
    fit.set_defaults(run=_probe)
    return parser


def _label(text: str) -> str:
    key, equals, value = text.partition("=")
    if key != "label" or not equals or not value:
        raise argparse.ArgumentTypeError(f"write label=COLUMN, got {text!r}")
    return value


def _show(arguments: argparse.Namespace) -> int:
    states = open_states(arguments.folder)
    if arguments.sample is not None:
        print(describe_sample(states, arguments.sample))
    else:
        print(describe(states, detailed=arguments.detailed))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    label, folder = arguments.label, as_path(arguments.folder)
    probes = probe(open_states(folder), label, seed=arguments.seed)
    print(as_table(probes))
    path = folder / f"probe-{re.sub(r'[^A-Za-z0-9_-]+', '_', label)}.json"
    write_file(path, (json.dumps(as_report(probes, label), indent=2) + "\n").encode())
    write_picture(path.with_suffix(".png"), probes, label)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
