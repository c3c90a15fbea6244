"""How captions end, and what each state leads to: text files, another try, the next batch."""

from pathlib import Path

import captions
import pytest
import torch

from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.captioning import Answerer, Record, _answers
from torchtune_qwen25vl.captioning._answers import Question
from torchtune_qwen25vl.captioning._plan import Policy, make_plan
from torchtune_qwen25vl.captioning._prompts import Preset
from torchtune_qwen25vl.captioning._texts import TextFiles
from torchtune_qwen25vl.generation import Generation
from torchtune_qwen25vl.jobs import Item, Past

STATES = ("done", "cut", "looped")
STOP = 151645


def test_only_what_failed_is_tried_again(tmp_path):
    names = [str(tmp_path / f"{state}.png") for state in (*STATES, "failed")]
    records = {name: Record(name, Path(name).stem, "Text.") for name in names}
    items = [Item(name, Path(name)) for name in names]
    policy = Policy(["jsonl"], TextFiles(), "overwrite", STATES, uses_existing=False)
    for retry_failed, tried in ((False, []), (True, names[-1:])):
        plan = make_plan(items, policy, Past({}, records), {}, retry_failed=retry_failed)
        assert [item.name for item in plan.pending] == tried


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
    network, transform = load_pretrained(model)
    said = Generation(torch.tensor([tokens]), [len(tokens)], [finish])
    monkeypatch.setattr(_answers, "generate", lambda *_, **__: said)
    monkeypatch.setattr(_answers, "prompt_batch", lambda *_, **__: {})
    preset = Preset("What?", max_new_tokens=99)
    answerer = Answerer(network, transform, preset, seed=0, shrunk=None, min_pixels=3136)
    (answer,) = answerer([Question("a", {}, 25088)])
    assert (answer.state, answer.tokens) == (state, len(tokens))
    assert answer.text == transform.decode([t for t in tokens if t != STOP]).strip()
