"""How captions are asked for and end, and what each state leads to."""

import os
from dataclasses import asdict
from pathlib import Path

import captions
import pytest
import torch

from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.captioning import Record
from torchtune_qwen25vl.captioning._plan import Policy, make_plan
from torchtune_qwen25vl.captioning._prompts import Preset, printable
from torchtune_qwen25vl.captioning._texts import TextFiles
from torchtune_qwen25vl.generation import Ended
from torchtune_qwen25vl.jobs import Answerer, Item, Past, Question, _answers

STATES = ("done", "cut", "looped")
STOP = 151645
PRESET = Preset("What?", max_new_tokens=99)


def test_only_what_failed_is_tried_again(tmp_path):
    names = [str(tmp_path / f"{state}.png") for state in (*STATES, "failed")]
    records = {name: Record(name, Path(name).stem, "Text.") for name in names}
    items = [Item(name, Path(name)) for name in names]
    policy = Policy(["jsonl"], TextFiles(), "overwrite", STATES, uses_existing=False)
    for retry, tried in (((), []), (("failed",), names[-1:])):
        plan = make_plan(items, policy, Past({}, records), {}, retry=retry)
        assert [item.name for item in plan.pending] == tried


def test_batches_are_made_of_all_that_goes_or_went_through_the_model(tmp_path):
    """Else a run that goes on would make other batches than one that never stopped."""
    names = [str(tmp_path / f"{state}.png") for state in (*STATES, "failed", "skipped", "new")]
    records = {name: Record(name, Path(name).stem, "Text.") for name in names[:4]}
    items = [Item(name, Path(name)) for name in names]
    policy = Policy(["jsonl"], TextFiles(), "skip", STATES, uses_existing=False)
    table = {names[4]: "It has a caption."}
    plan = make_plan(items, policy, Past({}, records), table, retry=())
    assert plan.settled[names[4]].state == "skipped"
    assert plan.pending == items[5:]
    assert plan.to_batch == [*items[:4], items[5]]


@pytest.mark.parametrize("formats", [["txt"], ["jsonl"]])
def test_a_caption_in_the_table_that_is_read_counts(tmp_path, formats):
    """Unless a text file, or where none are written a table of ours, says otherwise."""
    names = [str(tmp_path / os.fsdecode(name)) for name in (b"a.png", b"b\xe9.png")]
    items = [Item(name, Path(name), texts={"caption": "Known."}) for name in names]
    Path(names[1]).with_suffix(".txt").write_text("Mine.")
    policy = Policy(formats, TextFiles(), "skip", STATES, uses_existing=False)
    table = {printable(names[1]): "Mine."} if formats == ["jsonl"] else {names[0]: "Not read."}
    plan = make_plan(items, policy, Past(), table, retry=())
    found = [(record.state, record.caption) for record in plan.settled.values()]
    assert found == [("skipped", "Known."), ("skipped", "Mine.")]
    assert plan.unjournaled == []


@pytest.mark.parametrize("written", [["done"], ["cut"], ["cut", "looped"]])
def test_text_files_are_those_of_the_states_asked_for(run, photos, no_model, written):
    assert run(write_states=written) == 0
    states = captions.states(photos / "_captions")
    assert {"done", "cut"} <= set(states.values())
    expected = {Path(name).stem for name, state in states.items() if state in written}
    assert {Path(name).stem for name in captions.texts(photos)} == expected
    no_model()
    assert run(write_states=list(STATES)) == 0  # asked for now: the captions are known
    assert {Path(name).stem for name in captions.texts(photos)} == {Path(n).stem for n in states}


@pytest.mark.parametrize(("max_new_tokens", "batches"), [(12, 1), (1000, 4)])
def test_answers_count_in_the_tokens_of_a_batch(run, photos, capsys, max_new_tokens, batches):
    """Four images of 32 placeholders at most."""
    changes = {"batch_size": 4, "batch_tokens": 500, "max_new_tokens": max_new_tokens}
    assert run(dry_run=True, **changes) == 0
    assert f"4 to be captioned in {batches} batches" in capsys.readouterr().out


def asking(model, monkeypatch, say, preset=PRESET, seed=0):
    """An answerer whose batch is a stand-in, and whose questions need no image.

    `say` makes tokens and finish reason of each prompt, from how the batch was made and prompts.
    """

    class Standing:
        def __init__(self, model, pad_id, sampling, **options):
            self.options, self.questions = sampling._asdict() | options, []

        def enter(self, prompts):
            self.said = say(self.options, prompts)
            self.questions = [prompt.question for prompt in prompts]

        def advance(self):
            questions, self.questions = self.questions, []
            pairs = zip(questions, self.said, strict=True)
            return [Ended(question, *said) for question, said in pairs]

    monkeypatch.setattr(_answers, "RunningBatch", Standing)

    def shrunk(question, pixels):
        return asked(question.name, pixels)

    limits = {"batch_size": 9, "batch_tokens": 10**6, "min_pixels": 3136}
    return Answerer(*load_pretrained(model), preset, seed=seed, shrunk=shrunk, **limits)


def asked(name, pixels=25088):
    return Question(name, {"tokens": [], "pixels": pixels}, pixels)


LOOP = [1, 2, 3] * 8


@pytest.mark.parametrize(
    ("tokens", "finish", "state"),
    [
        ([1, 2, 3, STOP], "stop", "done"),
        ([1, 2, 3], "length", "cut"),
        ([9, *LOOP], "length", "looped"),
        ([9, *LOOP, STOP], "stop", "looped"),
        ([9, *LOOP, 5, 6, STOP], "stop", "done"),  # it found its way out
        ([9, *LOOP, 5, 6], "length", "cut"),
    ],
)
def test_an_answer_loops_where_it_ends_in_a_loop(model, monkeypatch, tokens, finish, state):
    answerer = asking(model, monkeypatch, lambda *_: [(tokens, finish)])
    ((answer,),) = answerer([[asked("a")]])
    assert (answer.state, answer.tokens) == (state, len(tokens))
    _, transform = load_pretrained(model)
    assert answer.text == transform.decode([t for t in tokens if t != STOP]).strip()


def test_all_steps_until_it_fits_are_told_in_their_order(model, monkeypatch):
    def limited(options, prompts):
        if [prompt.sample["pixels"] for prompt in prompts] != [6272]:
            raise torch.OutOfMemoryError
        return [([1, 2, STOP], "stop")]

    answerer = asking(model, monkeypatch, limited)
    (answers,) = answerer([[asked(name) for name in "ab"]])
    halved, *shrunk = "batch of 2 halved", "max_pixels 25088 -> 12544", "max_pixels 12544 -> 6272"
    assert [answer.state for answer in answers] == ["done", "done"]
    for answer in answers:
        assert answer.question.steps == (halved, *shrunk)
        assert answer.question.max_pixels == 6272


def test_the_model_is_asked_as_preset_and_seed_say(model, monkeypatch):
    seen, seeds = [], []

    def record(options, prompts):
        seen.append(options)
        seeds.extend(prompt.generator.initial_seed() for prompt in prompts)
        return [([1, 2, STOP], "stop")] * len(prompts)

    words = Preset("What?", 7, temperature=0.3, top_k=4, top_p=0.6, repetition_penalty=1.2)
    for seed, names in ((0, "a"), (1, "a"), (0, "b"), (0, "cba")):
        list(asking(model, monkeypatch, record, words, seed)([list(map(asked, names))]))
    assert [seeds[0], seeds[2]] == [seeds[5], seeds[4]]  # whatever else is in the batch
    assert len(set(seeds)) == 4
    _, transform = load_pretrained(model)
    options = {key: value for key, value in asdict(words).items() if key != "prompt"}
    assert seen == [options | {"stop_tokens": transform.stop_tokens}] * 4
