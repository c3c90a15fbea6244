"""The two ways to ask vLLM: in an environment of its own, or a server by its address."""

import base64
import json
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from parity.serve._answers import Answer
from parity.serve._questions import Question

Expected = Sequence[tuple[int, str]]  # tokens with their texts
OTHER = -1
SCRIPT, CAPTIONS = (Path(__file__).with_name(name) for name in ("_vllm.py", "_captions.py"))
TEMPLATE = Path(__file__).parents[1] / "reference" / "chat_template.jinja"


def ask_vllm(
    python: Path,
    folder: Path,
    questions: Sequence[Question],
    *,
    dtype: str,
    new_tokens: int,
    adapter: Path | None = None,
    fault: str = "",
    together: bool = True,
) -> tuple[str, dict[str, Answer], dict[str, Answer]]:
    """Ask an installed vLLM; return its version, and its answers alone and together.

    Args:
        python: of vLLM's environment
        folder: the model
        questions: what is asked
        dtype: float32 or bfloat16
        new_tokens: length of every answer
        adapter: a PEFT folder that is put on the model
        fault: a control, "one-axis positions"
        together: whether all questions are asked again in one batch

    Raises:
        ValueError: with its last line, if it does not answer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task, out = Path(scratch, "job.json"), Path(scratch, "answers.json")
        plain = Path(scratch, "model")  # vLLM takes brackets in a name for a pattern
        plain.symlink_to(folder.resolve())
        job = {
            "folder": str(plain),
            "dtype": dtype,
            "adapter": "" if adapter is None else str(adapter),
            "fault": fault,
            "together": together,
            "new_tokens": new_tokens,
            "max_tokens": 2048,
            "template": template_of(folder),
            "questions": [question.as_json() for question in questions],
        }
        task.write_text(json.dumps(job))
        words = [str(python), str(SCRIPT), str(task), str(out)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if not out.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line]
            raise ValueError(
                f"vLLM did not answer for {folder}: {(lines or ['no reason given'])[-1]}"
            )
        found = json.loads(out.read_text())
        alone = {name: _answer(answer) for name, answer in found["answers"].items()}
    answers = found["answers"].items()
    batch = {name: _answer(one["together"]) for name, one in answers if "together" in one}
    return found["version"], alone, batch


@contextmanager
def captioning_vllm(python: Path, job: dict[str, Any]) -> Iterator[Callable[[], list[str]]]:
    """Load a model into vLLM; the function that is given captions the job's photos, each time.

    Raises:
        ValueError: if vLLM does not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch, "job.json")
        task.write_text(json.dumps(job))
        words = [str(python), str(CAPTIONS), str(task)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(words, **pipes, stderr=subprocess.DEVNULL, text=True) as process:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None
            if not any(line == "ready\n" for line in stdout):
                raise ValueError(f"vLLM did not start for {job['folder']}")

            def caption() -> list[str]:
                print(file=stdin, flush=True)
                return json.loads(stdout.readline())

            yield caption
            stdin.close()


def template_of(folder: Path) -> str | None:
    """The published chat template for a folder that has none; None for one that has its own."""
    config = folder / "tokenizer_config.json"
    own = config.exists() and "chat_template" in json.loads(config.read_text())
    own = own or any((folder / f"chat_template.{end}").exists() for end in ("jinja", "json"))
    return None if own else TEMPLATE.read_text("utf-8")


def _answer(found: dict[str, Any]) -> Answer:
    patches = np.load(found["patches"]) if "patches" in found else None
    return Answer(
        found["prompt"],
        found["tokens"],
        found["logprobs"],
        patches,
        found.get("grids"),
        found.get("positions"),
    )


def ask_server(
    url: str, questions: Sequence[Question], expected: Mapping[str, Expected], new_tokens: int
) -> tuple[str, dict[str, Answer]]:
    """Ask a server that speaks OpenAI's API; return the model's name and its answers.

    Args:
        url: such as http://127.0.0.1:8000
        questions: what is asked, without videos: the API has no form for frames
        new_tokens: length of every answer
        expected: our answers, token by token, by which those of a server that returns no ids are
            known; a token of another text is -1

    Raises:
        ValueError: if it cannot be reached, or does not return log-probabilities.
    """
    base = url.rstrip("/").removesuffix("/v1")
    try:
        return _ask_server(base, questions, expected, new_tokens)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url} does not answer as OpenAI's API does: {error!r}") from error


def _ask_server(
    base: str, questions: Sequence[Question], expected: Mapping[str, Expected], new_tokens: int
) -> tuple[str, dict[str, Answer]]:
    model = _call(f"{base}/v1/models")["data"][0]["id"]
    answers = {}
    for question in questions:
        reply = _call(
            f"{base}/v1/chat/completions",
            {
                "model": model,
                "messages": _messages(question),
                "temperature": 0,
                "max_tokens": new_tokens,
                "logprobs": True,
                "ignore_eos": True,
                "return_token_ids": True,
            },
        )
        choice = reply["choices"][0]
        if not choice.get("logprobs"):
            raise ValueError(
                f"{base} returned no log-probabilities: allow them where it is started"
            )
        said = choice["logprobs"]["content"]
        tokens = choice.get("token_ids") or [
            token if one["token"] == text else OTHER
            for one, (token, text) in zip(said, expected[question.name], strict=False)
        ]
        logprobs = [one["logprob"] for one in said]
        answers[question.name] = Answer(reply.get("prompt_token_ids"), tokens, logprobs)
    return model, answers


def _messages(question: Question) -> list[dict[str, Any]]:
    """The messages with images in them, as data URLs."""
    images = iter(question.images)
    return [
        {**turn, "content": [_part(part, images) for part in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in question.messages
    ]


def _part(part: dict[str, Any], images: Any) -> dict[str, Any]:
    if part["type"] != "image":
        return part
    data = base64.b64encode(Path(next(images)).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:200]
        raise ValueError(f"{url} refuses the question ({error.code}): {said}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{url} does not answer ({error}): start the server, or mend --url"
        ) from error
