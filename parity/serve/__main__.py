"""`python -m parity.serve [TRAINED]`: every folder this project writes, ours and vLLM's answers.

TRAINED is what `tune-qwen25vl run finetune --config shapes_tiny` leaves; by default it is trained.
"""

import sys
from pathlib import Path

from parity.serve import ask_all, trained_folder


def main() -> int:
    """Run, and return the exit code; what cannot be asked is said in one line."""
    try:
        return ask_all(Path(sys.argv[1]) if len(sys.argv) > 1 else trained_folder())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
