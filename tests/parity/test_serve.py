"""vLLM as a second reference: where answers part is named, with a server or an installed vLLM."""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback import Silent, listening
from PIL import Image

from parity.__main__ import main
from parity.faults import FAULTS
from parity.faults.rules import RULES
from parity.random_folder import write_random
from parity.reference.serving import Server
from parity.serve import VLLM_DEVIATIONS
from parity.serve._answers import Answer, ask_ours
from parity.serve._compare import LOGPROBS, compare
from parity.serve._folders import TEXT, VISION, limit_videos
from parity.serve._peers import ask_vllm, template_of
from parity.serve._questions import write_questions
from parity.serve._run import NEW_TOKENS, Ours
from torchtune_qwen25vl import load_pretrained

OURS = Answer(
    [1, 2, 3],
    [7, 8, 9],
    [-1.0, -2.0, -3.0],
    np.zeros((4, 6), np.float32),
    [[1, 2, 2]],
    [[0, 0, 0], [1, 1, 1], [1, 1, 2]],
    [0.5, 0.01, 0.5],
)


@pytest.mark.parametrize(
    ("changes", "stage", "what"),
    [
        ({}, "", ""),
        ({"prompt": None, "patches": None, "grids": None, "positions": None}, "", ""),
        ({"grids": [[1, 2, 4]]}, "pixels", "grids"),
        ({"patches": np.full((4, 6), 1e-3, np.float32)}, "pixels", "patches differ by 1.0e-03"),
        ({"prompt": [1, 2, 4]}, "tokens", "prompts of 3 and 3, part at 2"),
        ({"positions": [[0] * 3, [1] * 3, [2] * 3]}, "positions", "token 2: [1, 1, 2], [2, 2, 2]"),
        ({"tokens": [7, 5, 9]}, "logits", "token 1 is 8 and 5, margin 1.0e-02"),
        ({"logprobs": [-1.0, -2.0, -3.1]}, "logits", "log-probabilities differ by 1.0e-01"),
        ({"logprobs": [-1.0, -2.0, -3.0 - LOGPROBS / 2]}, "", ""),
    ],
)
def test_the_first_stage_that_differs_is_named(changes, stage, what):
    found = compare(OURS, replace(OURS, **changes))
    assert (found.stage, found.what[: len(what)]) == (stage, what)
    assert found.same == (not stage)


def test_earlier_stages_go_before_later_ones():
    wrong = {"prompt": [9], "positions": [[9] * 3], "tokens": [9], "logprobs": [-9.0]}
    assert compare(OURS, replace(OURS, **wrong)).stage == "tokens"
    del wrong["prompt"]
    assert compare(OURS, replace(OURS, **wrong)).stage == "positions"


@pytest.mark.parametrize(("token", "ties"), [(1, True), (2, False)])
def test_only_near_tokens_of_a_rounded_peer_tie(token, ties):
    tokens = [5 if index == token else said for index, said in enumerate(OURS.tokens)]
    theirs = replace(OURS, tokens=tokens, logprobs=[-1.1, -2.1, -3.1])
    found = compare(OURS, theirs, rounded=True)
    assert (found.ties, found.same) == (ties, ties)
    assert found.logprobs == pytest.approx(0.1)  # reported
    assert not compare(OURS, theirs).same


def test_a_rounded_peer_may_not_be_far_off():
    theirs = replace(OURS, logprobs=[-1.1, -2.1, -3.1])
    assert compare(OURS, theirs, rounded=True).same
    assert not compare(OURS, replace(theirs, logprobs=[-1.0, -2.3, -3.0]), rounded=True).same


class OneAxis:
    """A transform that counts tokens instead of knowing where they stand."""

    def __init__(self, transform):
        self.transform, self.pad_id = transform, transform.pad_id

    def __call__(self, conversation, inference):
        sample = self.transform(conversation, inference=inference)
        counted = torch.arange(len(sample["tokens"]))
        return {**sample, "input_pos": counted[:, None].expand(-1, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("served") / "a model [1]"
    return limit_videos(write_random(scratch, text=TEXT, vision=VISION))


@pytest.fixture(scope="module")
def replies(folder, tmp_path_factory):
    """What a server would reply to questions without videos: our answers, or on one axis."""
    media = tmp_path_factory.mktemp("media")
    questions = [question for question in write_questions(media) if not question.videos]

    def make(one_axis=False):
        model, transform = load_pretrained(folder)
        asked = OneAxis(transform) if one_axis else transform
        answers = ask_ours(model, asked, questions, NEW_TOKENS)
        return list(answers.values()), transform.decode

    return make


@pytest.fixture
def server():
    """A stand-in for a server of OpenAI's API: it replies what it is given, and keeps the asked."""
    started = ExitStack()

    def start(answers=(), decode=None, *, with_ids=True, status=200, models=("served",)):
        asked, left = [], list(answers)

        class Handler(Silent):
            def do_GET(self):
                self._reply({"data": [{"id": name} for name in models]})

            def do_POST(self):
                size = int(self.headers["Content-Length"])
                asked.append(json.loads(self.rfile.read(size)))
                answer = left.pop(0) if left else OURS
                pairs = zip(answer.tokens, answer.logprobs, strict=True)
                content = [
                    {"token": decode([token], False), "logprob": score} for token, score in pairs
                ]
                choice = {"logprobs": {"content": content}}
                reply = {"choices": [choice]}
                if with_ids:
                    choice["token_ids"] = answer.tokens
                    reply["prompt_token_ids"] = answer.prompt
                self._reply(reply)

            def _reply(self, body):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        return started.enter_context(listening(Handler)), asked

    with started:
        yield start


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_server_that_answers_as_ours(folder, replies, server, capsys, with_ids):
    url, asked = server(*replies(), with_ids=with_ids)
    assert main(["--serve", str(folder), "--url", f"{url}/v1/"]) == 0
    out = capsys.readouterr().out
    assert "differs" not in out.replace("differ by", "")
    assert "takes no frames" in out
    assert "video" not in out
    image = asked[2]["messages"][0]["content"][0]["image_url"]["url"]
    assert image.startswith("data:image/png;base64,")
    assert (asked[2]["temperature"], asked[2]["logprobs"]) == (0, True)


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_server_that_counts_on_one_axis(folder, replies, server, capsys, with_ids):
    url, _ = server(*replies(one_axis=True), with_ids=with_ids)
    assert main(["--serve", str(folder), "--url", url]) == 1
    lines = capsys.readouterr().out.splitlines()
    (text,) = [line for line in lines if line.startswith("| text ")]
    images = [line for line in lines if line.startswith("| image ")]
    assert "the same" in text
    assert any("logits: " in line and "differs" in line for line in images)


@pytest.mark.parametrize(
    ("status", "words"), [(None, "start the server, or mend --url"), (404, "refuses the question")]
)
def test_a_server_that_is_not_there_is_one_line(folder, server, capsys, status, words):
    url = "http://127.0.0.1:9" if status is None else server(status=status)[0]
    assert main(["--serve", str(folder), "--url", url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_server_of_another_kind_is_one_line(folder, server, capsys):
    url, _ = server(models=[])
    assert main(["--serve", str(folder), "--url", url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not answer as OpenAI's API does" in line


def test_a_folder_that_is_none_is_one_line(tmp_path, capsys):
    assert main(["--serve", str(tmp_path / "nothing"), "--url", "http://127.0.0.1:9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--url", "http://127.0.0.1:9"], "--url goes with --serve"),
        (["--peer", "vllm"], "--peer goes with --bench captioning"),
        (["--peer", "vllm", "--bench", "image"], "--peer goes with --bench captioning"),
    ],
)
def test_options_that_mean_nothing_are_refused(words, said, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


@pytest.mark.parametrize("named", ["there is no such python", None])
def test_no_vllm_is_one_line_with_the_ways_to_have_one(tmp_path, capsys, monkeypatch, named):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PARITY_VLLM_PYTHON", raising=False)
    if named is not None:
        monkeypatch.setenv("PARITY_VLLM_PYTHON", named)
    assert main(["--serve", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "PARITY_VLLM_PYTHON" in line
    assert ("--url" in line) == (named is None)


def test_a_deviation_explains_what_it_equals_and_nothing_else(folder, tmp_path):
    model, transform = load_pretrained(folder)
    (question,) = (
        q for q in write_questions(tmp_path) if q.name.startswith("video, 60 frames at 25")
    )
    ours = Ours(model, transform, [question])
    with FAULTS["time of frames in fp64"].seed():
        theirs = ask_ours(model, transform, [question], NEW_TOKENS)
    (found,) = ours.compare(theirs, rounded=False).values()
    assert (found.stage, found.verdict) == ("positions", "deviation")
    (answer,) = theirs.values()
    other = [[t + (k == 9), h, w] for k, (t, h, w) in enumerate(answer.positions)]
    (found,) = ours.compare(
        {question.name: replace(answer, positions=other)}, rounded=False
    ).values()
    assert (found.stage, found.verdict) == ("positions", "differs")


def test_a_folder_without_a_template_gets_the_published_one(folder, tmp_path):
    assert "vision_start" in template_of(folder)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert template_of(tmp_path) is None


def test_every_deviation_has_a_thread():
    for deviation in VLLM_DEVIATIONS:
        assert deviation.thread.startswith("https://")


def test_images_on_one_axis_are_no_deviation(folder, tmp_path):
    model, transform = load_pretrained(folder)
    asked = [q for q in write_questions(tmp_path) if q.name in ("three images", "text")]
    theirs = ask_ours(model, OneAxis(transform), asked, NEW_TOKENS)
    found = Ours(model, transform, asked).compare(theirs, rounded=False)
    assert found["text"].verdict == "the same"
    assert (found["three images"].stage, found["three images"].verdict) == ("positions", "differs")


def test_transformers_gives_the_same_answers_or_those_of_its_deviation(folder, tmp_path):
    asked = write_questions(tmp_path)
    model, transform = load_pretrained(folder)
    theirs = Server(folder, template_of(folder))

    def answer(question):
        images = [Image.open(path).convert("RGB") for path in question.images]
        videos = [(np.load(path), rate) for path, rate in question.videos]
        return Answer(*theirs.answer(question.messages, images, videos, NEW_TOKENS))

    shown = [question for question in asked if not question.videos]
    ours = ask_ours(model, transform, shown, NEW_TOKENS)
    assert all(compare(ours[question.name], answer(question)).same for question in shown)
    (film,) = (question for question in asked if question.name == "image beside video")
    assert not compare(ask_ours(model, transform, [film], NEW_TOKENS)[film.name], answer(film)).same
    with RULES["text resumes behind the grid"].seed():
        ours = ask_ours(model, transform, [film], NEW_TOKENS)
    assert compare(ours[film.name], answer(film)).same


def test_an_installed_vllm_answers_the_same_and_shows_a_fault(folder, tmp_path):
    python = os.environ.get("PARITY_VLLM_PYTHON")
    if python is None:
        pytest.skip("PARITY_VLLM_PYTHON names no environment that has vLLM; .ci/serve makes one")
    questions = [q for q in write_questions(tmp_path) if "images" in q.name]
    model, transform = load_pretrained(folder, dtype=torch.float32)
    ours = ask_ours(model, transform, questions, NEW_TOKENS)
    stages = []
    for fault in ("", "one-axis positions"):
        _, theirs, _ = ask_vllm(
            Path(python), folder, questions, dtype="float32", new_tokens=NEW_TOKENS, fault=fault
        )
        stages += [compare(ours[name], theirs[name]).stage for name in theirs]
    assert stages == ["", "positions"]
