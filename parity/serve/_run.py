"""Folders and servers to tables of where ours and vLLM part."""

import shutil
import tempfile
from pathlib import Path

import torch

from parity import report
from parity.serve._answers import ask_ours
from parity.serve._compare import Comparison, compare
from parity.serve._deviations import DEVIATIONS
from parity.serve._environment import make_vllm
from parity.serve._folders import Served, limit_videos, write_folders
from parity.serve._peers import ask_server, ask_vllm
from parity.serve._questions import Question, write_questions
from torchtune_qwen25vl import load_pretrained

NEW_TOKENS = 16
COLUMNS = ("question", "first difference", "log-probabilities differ by", "verdict")
ALL_COLUMNS = (
    "folder",
    "the same",
    "deviations",
    "log-probabilities differ by",
    "verdict",
)
FAULT = "one-axis positions"


def ask_folder(folder: Path, url: str | None = None) -> int:
    """Ask ours and vLLM about a folder, print where they part; return the exit code.

    Args:
        folder: a Qwen2.5-VL folder
        url: of a server that serves it; by default vLLM is run here, in the dtype of the files

    Raises:
        ValueError: if the folder cannot be read, or vLLM cannot be asked.
    """
    model, transform = load_pretrained(folder)
    rounded = model.dtype != torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        questions = write_questions(Path(scratch))
        alone, _ = ask_ours(model.float(), transform, questions, NEW_TOKENS)
        if url is not None:
            expected = {
                name: [(token, transform.decode([token], False)) for token in answer.tokens]
                for name, answer in alone.items()
            }
            peer, theirs = ask_server(url, questions, expected, NEW_TOKENS)
            rounded = True  # a server does not say what it computes in
        else:
            dtype = "bfloat16" if rounded else "float32"
            version, theirs, _ = ask_vllm(
                make_vllm(), folder, questions, dtype=dtype, new_tokens=NEW_TOKENS
            )
            peer = f"vLLM {version}"
    found = {name: compare(alone[name], theirs[name], rounded=rounded) for name in theirs}
    print(f"{folder}: ours in float32, and {peer}")
    print(report.table([_row(name, one) for name, one in found.items()], COLUMNS))
    if left := [question.name for question in questions if question.name not in theirs]:
        print(f"not asked, as the server takes no frames: {', '.join(left)}")
    return int(any(_verdict(name, one) == "differs" for name, one in found.items()))


def ask_all(trained: Path | None = None) -> int:
    """Ask about every folder that this project writes, and under a fault; return the exit code.

    Args:
        trained: output of `tune-qwen25vl run finetune --config shapes_tiny`, its folder `model`
    """
    python, rows = make_vllm(), []
    with tempfile.TemporaryDirectory() as scratch:
        (media := Path(scratch, "media")).mkdir()
        questions = write_questions(media)
        folders = list(write_folders(Path(scratch)))
        if trained is not None:
            copied = Path(shutil.copytree(trained, Path(scratch, "trained")))
            folders.append(Served("trained by shapes_tiny", limit_videos(copied)))
        for served in folders:
            rows.append(_ask(python, served, questions))
            print("  ".join(rows[-1]), flush=True)
        control = _ask(python, folders[0], questions, fault=FAULT)
    print(report.table(rows, ALL_COLUMNS))
    seen = control[-1] == "differs: positions"
    print(f"control, {FAULT} in vLLM: {'seen' if seen else 'NOT SEEN'}")
    return int(not seen or any(row[-1] != "passed" for row in rows))


def _ask(
    python: Path, served: Served, questions: list[Question], fault: str = ""
) -> tuple[str, ...]:
    """One folder in one line."""
    rounded = served.dtype == "bfloat16"
    model, transform = load_pretrained(served.ours or served.folder, dtype=torch.float32)
    ours = ask_ours(model, transform, questions, NEW_TOKENS)
    _, *theirs = ask_vllm(
        python,
        served.folder,
        questions,
        dtype=served.dtype,
        new_tokens=NEW_TOKENS,
        adapter=served.adapter,
        fault=fault,
    )
    found = [
        (name, compare(our[name], their[name], rounded=rounded))
        for our, their in zip(ours, theirs, strict=True)
        for name in their
    ]
    deviating = [name for name, one in found if _verdict(name, one) == "deviation"]
    differing = [one for name, one in found if _verdict(name, one) == "differs"]
    worst = max(one.logprobs for name, one in found if name not in deviating)
    same = len(found) - len(deviating) - len(differing)
    stages = sorted({one.stage for one in differing})
    for name, one in found:
        if one.stage and not fault:
            print(f"{served.name}: {name}: {one.stage}: {one.what}", flush=True)
    return (
        served.name,
        f"{same} of {len(found)}",
        str(len(deviating)),
        f"{worst:.1e}",
        f"differs: {', '.join(stages)}" if stages else "passed",
    )


def _row(name: str, found: Comparison) -> tuple[str, ...]:
    where = f"{found.stage}: {found.what}" if found.stage else "-"
    return name, where, f"{found.logprobs:.1e}", _verdict(name, found)


def _verdict(name: str, found: Comparison) -> str:
    if found.same:
        return "a tie" if found.ties else "the same"
    named = any(deviation.names(name, found.stage) for deviation in DEVIATIONS)
    return "deviation" if named else "differs"
