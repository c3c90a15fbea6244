"""A real ComfyUI, headless on the CPU, that runs workflows in folders of its own."""

import json
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.comfyui.__main__ import main

OPTIONS = (
    "--cpu",
    "--fp32-text-enc",
    "--disable-api-nodes",
    "--database-url",
    "sqlite:///:memory:",
)
STARTS, RUNS = 180, 300  # seconds, at most
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

Workflow = dict[str, dict[str, Any]]


class Server:
    """A server that is up.

    Attributes:
        base: its folder of models, custom nodes, inputs and outputs
        address: where it listens
    """

    def __init__(self, base: Path, port: int) -> None:
        self.base, self.address = base, f"http://127.0.0.1:{port}"

    def run(self, workflow: Workflow) -> dict[str, Any]:
        """Run a workflow; return what its output nodes show, by node.

        Raises:
            RuntimeError: with what ComfyUI says of a node that failed.
        """
        asked = {"prompt": workflow, "client_id": uuid.uuid4().hex}
        name = self._ask("/prompt", asked)["prompt_id"]
        end = time.monotonic() + RUNS
        while time.monotonic() < end:
            history = self._ask(f"/history/{name}")
            if name in history and history[name]["status"]["completed"]:
                return history[name]["outputs"]
            for kind, message in history.get(name, {}).get("status", {}).get("messages", []):
                if kind == "execution_error":
                    raise RuntimeError("{exception_type}: {exception_message}".format(**message))
            time.sleep(0.2)
        raise RuntimeError(f"ComfyUI has not run the workflow in {RUNS} s")

    def nodes(self) -> dict[str, Any]:
        """Return what all nodes take."""
        return self._ask("/object_info")

    def free(self) -> None:
        """Have all models leave memory, before the next workflow."""
        self._ask("/free", {"unload_models": True})

    def _ask(self, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data)
        with direct.open(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")


@contextmanager
def serving(comfyui: Path, python: str, base: Path) -> Iterator[Server]:
    """Start the ComfyUI of a checkout on the folders of `base`, with our nodes; end it at last.

    Raises:
        RuntimeError: with the end of what it said, if it does not start.
    """
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (base / name).symlink_to(comfyui / name)
    assert main(["install", str(base)]) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = base / "log.txt"
    command = [python, comfyui / "main.py", *OPTIONS, "--base-directory", base]
    command += ["--listen", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=output, cwd=base)
    try:
        server = Server(base, port)
        _wait(server, process, log)
        yield server
    finally:
        process.terminate()
        process.wait(30)


def _wait(server: Server, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            server.nodes()
            return
        time.sleep(0.5)
    raise RuntimeError(f"ComfyUI did not start:\n{log.read_text(errors='replace')[-4000:]}")
