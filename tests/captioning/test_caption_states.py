"""How captions are asked for and end, and what each state leads to."""

import os
from dataclasses import asdict
from pathlib import Path

import captions
import pytest
import torch

from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.captioning import Answerer, Record, _answers
from torchtune_qwen25vl.captioning._answers import Question
from torchtune_qwen25vl.captioning._plan import Policy, make_plan
from torchtune_qwen25vl.captioning._prompts import Preset, printable
from torchtune_qwen25vl.captioning._texts import TextFiles
from torchtune_qwen25vl.generation import Generation
from torchtune_qwen25vl.jobs import Item, Past

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


def asking(model, monkeypatch, generate, preset=PRESET, seed=0):
    """An answerer whose `generate` is a stand-in, and whose questions need no image."""
    monkeypatch.setattr(_answers, "generate", generate)
    monkeypatch.setattr(_answers, "prompt_batch", lambda samples, *_, **__: {"samples": samples})

    def shrunk(question, pixels):
        return Question(question.name, {"pixels": pixels}, pixels)

    return Answerer(*load_pretrained(model), preset, seed=seed, shrunk=shrunk, min_pixels=3136)


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
    said = Generation(torch.tensor([tokens]), [len(tokens)], [finish])
    answerer = asking(model, monkeypatch, lambda *_, **__: said)
    (answer,) = answerer([Question("a", {}, 25088)])
    assert (answer.state, answer.tokens) == (state, len(tokens))
    _, transform = load_pretrained(model)
    assert answer.text == transform.decode([t for t in tokens if t != STOP]).strip()


def test_all_steps_until_it_fits_are_told_in_their_order(model, monkeypatch):
    def limited(network, batch, **options):
        if batch["samples"] != [{"pixels": 6272}]:
            raise torch.OutOfMemoryError
        return Generation(torch.tensor([[1, 2, STOP]]), [3], ["stop"])

    answerer = asking(model, monkeypatch, limited)
    answers = answerer([Question(name, {"pixels": 25088}, 25088) for name in "ab"])
    halved, *shrunk = "batch of 2 halved", "max_pixels 25088 -> 12544", "max_pixels 12544 -> 6272"
    assert [answer.state for answer in answers] == ["done", "done"]
    for answer in answers:
        assert answer.question.steps == (halved, *shrunk)
        assert answer.question.max_pixels == 6272


def test_the_model_is_asked_as_preset_and_seed_say(model, monkeypatch):
    asked = []

    def record(network, batch, **options):
        asked.append(options | {"generator": options["generator"].initial_seed()})
        return Generation(torch.tensor([[1, 2, STOP]]), [3], ["stop"])

    words = Preset("What?", 7, temperature=0.3, top_k=4, top_p=0.6, repetition_penalty=1.2)
    for seed, name in ((0, "a"), (1, "a"), (0, "b"), (0, "a")):
        asking(model, monkeypatch, record, words, seed)([Question(name, {}, 25088)])
    seeds = [options.pop("generator") for options in asked]
    assert seeds[0] == seeds[3]
    assert len(set(seeds)) == 3
    _, transform = load_pretrained(model)
    options = {key: value for key, value in asdict(words).items() if key != "prompt"}
    assert asked == [options | {"stop_tokens": transform.stop_tokens}] * 4
