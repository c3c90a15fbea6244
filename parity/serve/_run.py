"""Folders and servers to tables of where ours and vLLM part."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from parity import report
from parity.serve._answers import Answer, ask_ours
from parity.serve._compare import Comparison, compare
from parity.serve._deviations import REFUSALS, VLLM_DEVIATIONS, VllmDeviation
from parity.serve._environment import find_vllm, make_vllm
from parity.serve._folders import Served, limit_videos, write_folders
from parity.serve._peers import ask_server, ask_vllm
from parity.serve._questions import Question, write_questions
from torchtune_qwen25vl import Qwen25VL, Qwen25VLTransform, load_pretrained

NEW_TOKENS = 16
COLUMNS = ("question", "first difference", "log-probabilities differ by", "verdict")
ALL_COLUMNS = ("folder", "the same", "deviations", "log-probabilities differ by", "verdict")
FAULT = "one-axis positions"


@dataclass
class Ours:
    """Our side of a folder, in fp32; what it is asked twice it answers once."""

    model: Qwen25VL
    transform: Qwen25VLTransform
    questions: Sequence[Question]

    def __post_init__(self) -> None:
        self._videos = [question for question in self.questions if question.videos]
        self._under: dict[str, dict[str, Answer]] = {}  # answers about videos, by deviation

    @cached_property
    def answers(self) -> dict[str, Answer]:
        """Our answers, by name."""
        return ask_ours(self.model, self.transform, self.questions, NEW_TOKENS)

    def compare(self, theirs: Mapping[str, Answer], *, rounded: bool) -> dict[str, Comparison]:
        """Compare answers by name; what a deviation explains, the whole answer, is named by it."""
        found = {
            name: compare(self.answers[name], answer, rounded=rounded)
            for name, answer in theirs.items()
        }
        for deviation in VLLM_DEVIATIONS:
            names = [q.name for q in self._videos if q.name in found]
            for name in [
                n for n in names if found[n].differs and found[n].stage == deviation.stage
            ]:
                answer = self._answers_under(deviation)[name]
                if compare(answer, theirs[name], rounded=rounded).same:
                    found[name] = replace(found[name], deviation=deviation.what)
        return found

    def _answers_under(self, deviation: VllmDeviation) -> dict[str, Answer]:
        """Our answers about videos, with the fault that equals a deviation."""
        if deviation.what not in self._under:
            with deviation.fault(self.transform).seed():
                again = ask_ours(self.model, self.transform, self._videos, NEW_TOKENS)
            self._under[deviation.what] = again
        return self._under[deviation.what]


def ask_folder(folder: Path, url: str | None = None) -> int:
    """Ask ours and vLLM about a folder, print where they part; return the exit code.

    Args:
        folder: a Qwen2.5-VL folder
        url: of a server that serves it; by default vLLM is run here, in the dtype of the files

    Raises:
        ValueError: if the folder cannot be read, or vLLM cannot be asked.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: name one that holds a Qwen2.5-VL")
    python = find_vllm() if url is None else None
    model, transform = load_pretrained(folder)
    rounded = url is not None or model.dtype != torch.float32
    with tempfile.TemporaryDirectory() as scratch:
        questions = write_questions(Path(scratch))
        if url is not None:
            questions = [question for question in questions if not question.videos]
        ours = Ours(model.float(), transform, questions)
        if url is not None:
            expected = {
                name: [(token, transform.decode([token], False)) for token in answer.tokens]
                for name, answer in ours.answers.items()
            }
            peer, theirs = ask_server(url, questions, expected, NEW_TOKENS)
            print(
                f"A server takes no frames and tells no pixels and no positions; what {peer} "
                "computes in is not known either: log-probabilities are judged as of bf16."
            )
        else:
            assert python is not None
            dtype = "bfloat16" if rounded else "float32"
            version, theirs, _ = ask_vllm(
                python, folder, questions, dtype=dtype, new_tokens=NEW_TOKENS
            )
            peer = f"vLLM {version} in {dtype}"
        found = ours.compare(theirs, rounded=rounded)
    print(f"{folder}: ours in float32, and {peer}")
    print(report.table([_row(name, one) for name, one in found.items()], COLUMNS))
    for what in dict.fromkeys(one.deviation for one in found.values() if one.deviation):
        print(f"deviation: vLLM {what}")
    return int(any(one.differs for one in found.values()))


def ask_all(trained: Path) -> int:
    """Ask about every folder that this project writes, and under a fault; return the exit code.

    Args:
        trained: output of `tune-qwen25vl run finetune --config shapes_tiny`, its folder `model`
    """
    python, rows = make_vllm(), []
    with tempfile.TemporaryDirectory() as scratch:
        (media := Path(scratch, "media")).mkdir()
        questions = write_questions(media)
        copied = Path(shutil.copytree(trained, Path(scratch, "trained")))
        folders = list(write_folders(Path(scratch)))
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
    """One folder in one line: every question alone, and in a batch of all."""
    rounded = served.dtype == "bfloat16"
    options: dict[str, Any] = {
        "dtype": served.dtype,
        "new_tokens": NEW_TOKENS,
        "adapter": served.adapter,
        "fault": fault,
        "together": not served.refused,
    }
    refused = [question for question in questions if question.name in served.refused]
    questions = [question for question in questions if question not in refused]
    model, transform = load_pretrained(served.ours or served.folder, dtype=torch.float32)
    ours = Ours(model, transform, questions)
    _, alone, together = ask_vllm(python, served.folder, questions, **options)
    if refused:
        _check_refused(python, served.folder, refused, options)
    batch = {  # whose inputs are those of the questions alone
        name: replace(alone[name], tokens=one.tokens, logprobs=one.logprobs)
        for name, one in together.items()
    }
    found = [
        (name, one)
        for theirs in (alone, batch)
        for name, one in ours.compare(theirs, rounded=rounded).items()
    ]
    for name, one in found:
        if one.stage and not fault:
            print(f"{served.name}: {name}: {one.stage}: {one.what}: {one.verdict}", flush=True)
    named = [one for _, one in found if one.deviation]
    differing = [one for _, one in found if one.differs]
    stages = sorted({one.stage for one in differing})
    return (
        served.name,
        f"{len(found) - len(named) - len(differing)} of {len(found)}",
        f"{len(named)}{f', {len(refused)} refused' if refused else ''}",
        f"{max(one.logprobs for _, one in found if not one.deviation):.1e}",
        f"differs: {', '.join(stages)}" if stages else "passed",
    )


def _check_refused(
    python: Path, folder: Path, questions: list[Question], options: dict[str, Any]
) -> None:
    """See that vLLM still ends with an error there, so that the table says what is so.

    Raises:
        ValueError: if it answers.
    """
    for question in questions:
        try:
            ask_vllm(python, folder, [question], **options)
        except ValueError as error:
            print(f"{question.name}: {REFUSALS[question.name]}: {error}", flush=True)
        else:
            raise ValueError(f"vLLM answers {question.name} now: take it out of REFUSALS")


def _row(name: str, found: Comparison) -> tuple[str, ...]:
    where = f"{found.stage}: {found.what}" if found.stage else "-"
    return name, where, f"{found.logprobs:.1e}", found.verdict
