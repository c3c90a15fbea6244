"""`python -m torchtune_qwen25vl.comfyui install|uninstall COMFYUI_DIR`: nodes for a ComfyUI."""

import argparse
import sys
from pathlib import Path

from torchtune_qwen25vl.comfyui._shim import install, uninstall

WORKFLOWS = Path(__file__).parent / "workflows"
DESCRIPTION = """\
Make a ComfyUI find the nodes of this package, or no longer. The package itself must be installed
for the Python that runs ComfyUI; run this command with that Python.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        print(arguments.run(arguments.comfyui))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchtune_qwen25vl.comfyui", description=DESCRIPTION
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, what in (
        ("install", _install, "write a small folder into custom_nodes"),
        ("uninstall", _uninstall, "remove that folder"),
    ):
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("comfyui", type=Path, help="folder that main.py of ComfyUI is in")
        command.set_defaults(run=run)
    return parser


def _install(comfyui: Path) -> str:
    written = install(comfyui)
    return f"written to {written}; start ComfyUI anew, and open a workflow of {WORKFLOWS}"


def _uninstall(comfyui: Path) -> str:
    return f"removed {uninstall(comfyui)}"


if __name__ == "__main__":
    sys.exit(main())
