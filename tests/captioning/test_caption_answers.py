"""Answers to batches: memory that runs out, rows that fail, loops."""

from dataclasses import replace

import captions
import pytest
import torch
from torchtune.data import Message

from torchtune_qwen25vl import Qwen25VLTransform, load_pretrained
from torchtune_qwen25vl.captioning import Questioner
from torchtune_qwen25vl.captioning._prompts import Preset, Wording
from torchtune_qwen25vl.generation import RunningBatch
from torchtune_qwen25vl.jobs import Answerer, Item
from torchtune_qwen25vl.jobs._answers import loops
from torchtune_qwen25vl.media import load_image

PRESET = Preset("What?", max_new_tokens=4)
LEAST = 3136
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_pretrained(captions.write_model(tmp_path_factory.mktemp("m") / "tiny", ends=0))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = captions.write_pictures(tmp_path_factory.mktemp("p") / "photos", 4)
    return {str(path): Item(str(path), path) for path in sorted(folder.iterdir())}


@pytest.fixture
def questioner(loaded):
    return Questioner(loaded[1], Wording("What?"), {}, min_pixels=LEAST, max_pixels=25088)


def answered(answerer, questions):
    """The answers to one batch, in the order of its questions."""
    answers = {answer.question.name: answer for ended in answerer([questions]) for answer in ended}
    return [answers[question.name] for question in questions]


def asking(loaded, shrunk=None):
    limits = {"batch_size": 9, "batch_tokens": 10**6, "min_pixels": LEAST}
    return Answerer(*loaded, PRESET, seed=0, shrunk=shrunk, **limits)


@pytest.fixture
def ask(loaded, items, questioner):
    """The answers to all items, by a model that may be out of memory."""

    def shrunk(question, pixels):
        return questioner.again(items[question.name], pixels)

    def ask():
        questions = [questioner.again(item, 25088) for item in items.values()]
        return answered(asking(loaded, shrunk), questions)

    return ask


def patches(question):
    return len(question.sample["encoder_input"]["vision"]["pixel_values"])


@pytest.fixture
def limited(monkeypatch):
    """Let a running batch run out of memory beyond so many patches in flight."""

    def limit(most, error=OUT_OF_MEMORY):
        enter = RunningBatch.enter

        def limited(self, prompts):
            questions = [*self.questions, *(prompt.question for prompt in prompts)]
            if sum(map(patches, questions)) > most:
                raise error
            enter(self, prompts)

        monkeypatch.setattr(RunningBatch, "enter", limited)

    return limit


def texts(answers):
    return [answer.text for answer in answers]


def test_a_batch_is_halved_and_answers_stay(ask, limited, caplog):
    whole = ask()
    limited(max(patches(answer.question) for answer in whole))
    halved = ask()
    assert texts(halved) == texts(whole)
    assert all("batch of 4 halved" in answer.question.steps for answer in halved)
    assert "batch of 4: halved" in caplog.text


def test_the_cpus_own_error_counts_too(ask, limited):
    whole = ask()
    limited(120, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert texts(ask()) != []
    assert [a.state for a in ask()] == [a.state for a in whole]


def test_an_image_is_made_smaller_and_it_is_recorded(ask, limited, caplog):
    limited(64)
    answers = ask()
    shrunk = [a for a in answers if a.question.max_pixels < 25088]
    assert shrunk
    assert all(a.text for a in answers)
    assert any("max_pixels 25088 -> 12544" in a.question.steps for a in shrunk)
    assert "out of memory alone, max_pixels 25088 -> 12544" in caplog.text


def test_an_image_that_never_fits_fails_alone(ask, limited):
    limited(0)
    answers = ask()
    assert {a.state for a in answers} == {"failed"}
    assert all(a.reason.startswith(f"out of memory with max_pixels {LEAST}") for a in answers)


def test_another_error_of_the_device_ends_the_run(ask, limited):
    limited(0, RuntimeError("device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side"):
        ask()


def test_a_row_that_is_not_finite_fails_alone(loaded, items, questioner):
    questions = [questioner.again(item, 25088) for item in items.values()]
    poisoned = {
        **questions[1].sample,
        "encoder_input": {"vision": dict(questions[1].sample["encoder_input"]["vision"])},
    }
    vision = poisoned["encoder_input"]["vision"]
    vision["pixel_values"] = vision["pixel_values"] * torch.nan
    answerer = asking(loaded)
    clean = answered(answerer, questions)
    questions[1] = replace(questions[1], sample=poisoned)
    answers = answered(answerer, questions)
    assert answers[1].state == "failed"
    assert "finite" in answers[1].reason
    assert [texts(answers)[k] for k in (0, 2, 3)] == [texts(clean)[k] for k in (0, 2, 3)]


def test_an_image_gone_in_the_meantime_fails_alone(loaded, items, questioner, limited):
    limited(64)

    def gone(question, pixels):
        raise ValueError("no such file")

    questions = [questioner.again(item, 25088) for item in items.values()]
    answers = answered(asking(loaded, gone), questions)
    assert {a.reason for a in answers if a.state == "failed"} == {"no such file"}


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([1] * 24, True),
        ([1] * 23, False),
        (list(range(50)) + [1, 2, 3] * 8, True),
        (list(range(50)) + [1, 2, 3] * 7, False),
        (list(range(12)) * 4, True),
        (list(range(12)) * 3, False),
        ([1] * 24 + [2], False),
        (list(range(100)), False),
        ([], False),
    ],
)
def test_loops(tokens, looping):
    assert loops(tokens) == looping


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_a_system_prompt_may_be_empty(loaded, items, system):
    wording = Wording("What?", system=system)
    questioner = Questioner(loaded[1], wording, {}, min_pixels=LEAST, max_pixels=25088)
    sample = questioner.again(next(iter(items.values())), 25088).sample
    text = loaded[1].decode(sample["tokens"].tolist(), skip_special_tokens=False)
    assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n")


def test_pixels_read_apart_are_those_of_the_transform(loaded, items, tmp_path):
    """Resized by a worker and then transformed: the same tensors as in one step."""
    folder = captions.write_pictures(tmp_path / "more", 6, seed=7)
    for limits in (
        {"min_pixels": 3136, "max_pixels": 12544},
        {"min_pixels": 30000, "max_pixels": 99999},
    ):
        questioner = Questioner(loaded[1], Wording("What?"), {}, **limits)
        whole = Qwen25VLTransform.__new__(Qwen25VLTransform)
        whole.__dict__ = dict(loaded[1].__dict__)
        whole.image_transform = type(loaded[1].image_transform)(**limits)
        for path in folder.iterdir():
            ours = questioner.again(Item(str(path), path), limits["max_pixels"]).sample
            content = [
                {"type": "image", "content": load_image(path)},
                {"type": "text", "content": "What?"},
            ]
            theirs = whole({"messages": [Message("user", content)]}, inference=True)
            assert torch.equal(ours["tokens"], theirs["tokens"])
            for name in ("pixel_values", "grid_thw"):
                a, b = (s["encoder_input"]["vision"][name] for s in (ours, theirs))
                assert torch.equal(a, b)
