"""Images in flight: when they enter, what ended, and what a failure among them costs."""

import random

import captions
import pytest
import torch

from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.captioning import Questioner
from torchtune_qwen25vl.captioning._prompts import Preset, Wording
from torchtune_qwen25vl.generation import NotFiniteError, RunningBatch, _running
from torchtune_qwen25vl.jobs import Answerer, Item, _answers

PRESET = Preset("What?", max_new_tokens=64)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_pretrained(captions.write_model(tmp_path_factory.mktemp("m") / "tiny"))


@pytest.fixture(scope="module")
def questions(loaded, tmp_path_factory):
    folder = captions.write_pictures(tmp_path_factory.mktemp("p") / "photos", 12)
    questioner = Questioner(loaded[1], Wording("What?"), {}, min_pixels=3136, max_pixels=25088)
    return [questioner.again(Item(path.name, path), 25088) for path in sorted(folder.iterdir())]


@pytest.fixture
def answerer(loaded):
    def make(preset=PRESET, *, batch_size=4, batch_tokens=10**6):
        limits = {"batch_size": batch_size, "batch_tokens": batch_tokens, "min_pixels": 3136}
        return Answerer(*loaded, preset, seed=0, shrunk=None, **limits)

    return make


@pytest.fixture
def entered(monkeypatch):
    """What entered at each time, and with what in flight; what is put here is called before."""
    calls = []

    def recorded(self, prompts):
        names = [prompt.question.name for prompt in prompts]
        calls.append(([question.name for question in self.questions], names))
        for call in before:
            call(len(calls))
        enter(self, prompts)

    enter, before = RunningBatch.enter, []
    monkeypatch.setattr(RunningBatch, "enter", recorded)
    return calls, before


def in_batches(values, size):
    return [values[k : k + size] for k in range(0, len(values), size)]


def by_name(groups):
    answers = [answer for group in groups for answer in group]
    assert len({answer.question.name for answer in answers}) == len(answers)
    return {answer.question.name: (answer.state, answer.text) for answer in answers}


def test_answers_are_those_of_each_image_alone(answerer, questions, entered):
    calls, _ = entered
    expected = by_name(answerer(batch_size=1)(in_batches(questions, 1)))
    assert {len(in_flight) for in_flight, _ in calls} == {0}
    assert {state for state, _ in expected.values()} > {"done", "cut"}  # they end all over
    calls.clear()
    for size, planned in ((4, 4), (3, 4), (8, 5), (12, 12)):
        assert by_name(answerer(batch_size=size)(in_batches(questions, planned))) == expected
    assert max(len(in_flight) for in_flight, _ in calls) > 2
    names = [question.name for question in questions]
    assert [name for _, new in calls for name in new] == 4 * names  # in their order


def test_the_limits_hold_at_any_time(answerer, questions, entered):
    """Large images first, as they are planned: more of the small ones may be in flight."""
    calls, _ = entered
    short = Preset("What?", max_new_tokens=8)
    length = {q.name: len(q.sample["tokens"]) + short.max_new_tokens for q in questions}
    planned = sorted(questions, key=lambda question: -length[question.name])
    most = 3 * max(length.values())
    assert len(by_name(answerer(short, batch_size=9, batch_tokens=most)([planned]))) == 12
    rows = [[*in_flight, *new] for in_flight, new in calls]
    assert len(rows[0]) == 3 < max(map(len, rows))
    assert all(len(names) * max(map(length.get, names)) <= most for names in rows)
    calls.clear()
    assert len(by_name(answerer(batch_tokens=1)([questions]))) == 12  # one always fits
    assert [len(new) for _, new in calls] == [1] * 12


def test_a_batch_is_asked_for_when_there_are_places(answerer, questions, entered):
    """The first one goes through the model before the second one is read."""
    calls, _ = entered
    asked = []

    def batches():
        for batch in in_batches(questions, 3):
            asked.append(len(calls))
            yield batch

    by_name(answerer(batch_size=6)(batches()))
    assert asked[:2] == [0, 1]
    assert [len(new) for _, new in calls[:1]] == [3]


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NotFiniteError("logits must be finite")])
@pytest.mark.parametrize("step", ["enter", "advance"])
def test_those_in_flight_are_answered_anew_and_no_others(
    answerer, questions, entered, monkeypatch, error, step
):
    expected = by_name(answerer()(in_batches(questions, 4)))
    calls, before = entered
    calls.clear()

    def fail(number):
        if number == 3:
            raise error

    if step == "enter":
        before.append(fail)
    else:
        advance = RunningBatch.advance
        monkeypatch.setattr(RunningBatch, "advance", lambda self: fail(len(calls)) or advance(self))
    ended, groups = [], []
    for group in answerer()(in_batches(questions, 4)):
        groups.append(group)
        if len(calls) < 3:
            ended += [answer.question.name for answer in group]
    # the third time some were in flight; with those that entered they enter a fresh batch
    in_flight, new = calls[2]
    assert in_flight
    assert calls[3] == ([], [*in_flight, *new])
    assert ended
    assert not set(ended) & {*in_flight, *new}
    assert by_name(groups) == expected


def scripted(monkeypatch, lengths):
    """Let answers have these lengths, by name; count forwards, and the rows of steps."""
    counts = {"prefills": 0, "steps": 0, "rows": 0}

    def prefill(model, batch, caches, last):
        counts["prefills"] += 1
        return torch.zeros(len(batch["tokens"]), 8)

    def decode(model, tokens, *_):
        counts["steps"] += 1
        counts["rows"] += len(tokens)
        return torch.zeros(len(tokens), 8)

    def reason(self, row):
        return "stop" if len(row.tokens) == lengths[row.prompt.question.name] else None

    monkeypatch.setattr(_running, "prefill", prefill)
    monkeypatch.setattr(_running, "decode_one_token", decode)
    monkeypatch.setattr(RunningBatch, "_finish_reason", reason)
    return counts


@pytest.mark.parametrize(
    ("worthwhile", "prefills", "steps"), [(32, 363, 893), (4, 60, 987), (1, 16, 1661)]
)
def test_what_a_run_costs(answerer, questions, monkeypatch, worthwhile, prefills, steps):
    """512 answers in 32 places; the last one is batches that wait for their longest.

    No fewer than 840 steps are possible, of 32 rows each.
    """
    generator = random.Random(0)
    lengths = [min(128, int(generator.lognormvariate(3.9, 0.4))) for _ in range(512)]
    named = {f"{k}": length for k, length in enumerate(lengths)}
    counts = scripted(monkeypatch, named)
    monkeypatch.setattr(_answers, "WORTHWHILE", worthwhile)
    sample = questions[0].sample
    asked = [_answers.Question(name, sample, 25088) for name in named]
    by_name(answerer(Preset("What?", max_new_tokens=128), batch_size=32)(in_batches(asked, 32)))
    assert counts["rows"] == sum(lengths) - 512 == 26868  # a row that has ended costs nothing
    assert (counts["prefills"], counts["steps"]) == (prefills, steps)
