"""The parity harness: what torchtune_qwen25vl computes against what transformers computes."""

import sys
from importlib.util import find_spec

if missing := [name for name in ("transformers", "skimage", "peft") if find_spec(name) is None]:
    remedy = "install torchtune-qwen25vl[parity]"
    print(
        f"parity compares with transformers and needs {', '.join(missing)}; {remedy}",
        file=sys.stderr,
    )
    raise SystemExit(2)
