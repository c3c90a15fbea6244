"""The recipe evaluate, from a table to its scores."""

import json
import os
import random
import shutil
import signal
import threading

import pytest
import tables
import torch
from forked import exit_code, fork
from on_ranks import on_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from torchtune.data import Message

from torchtune_qwen25vl import generate, load_pretrained, smart_resize
from torchtune_qwen25vl.evaluation import _ask, averaged
from torchtune_qwen25vl.evaluation._texts import anls, exact_match
from torchtune_qwen25vl.generation import RunningBatch, inference_batch, next_log_probs
from torchtune_qwen25vl.media import load_image


def alone(model, path, question):
    """The batch of one row, the model and its transform."""
    limits = {"min_pixels": 3136, "max_pixels": 25088}
    loaded, transform = load_pretrained(model)
    transform = type(transform).from_folder(model, **limits)
    content = [
        {"type": "image", "content": load_image(path)},
        {"type": "text", "content": question},
    ]
    return loaded, transform, inference_batch([[Message("user", content)]], transform)


def test_answers_are_those_of_each_row_alone_and_scores_are_theirs(run, model, table, out, capsys):
    assert run() == 0
    rows = tables.predictions(out)
    assert [row["id"] for row in rows] == [f"q{k}" for k in range(7)]
    for row in rows[:3]:
        loaded, transform, batch = alone(model, table.parent / row["image"], row["question"])
        said = generate(loaded, batch, max_new_tokens=6, stop_tokens=transform.stop_tokens)
        tokens = said.tokens[0, : said.lengths[0]].tolist()
        assert row["answer"] == transform.decode(tokens).strip()
        assert row["scores"]["anls"] == anls(row["answer"], row["references"])
        assert row["scores"]["exact_match"] == exact_match(row["answer"], row["references"])
    assert rows[1]["references"] == ["A red box on white.", "box"]
    found = tables.scores(out)
    expected = averaged([row["scores"]["anls"] for row in rows])
    assert found["scores"]["anls"] == vars(expected)
    assert (found["rows"], found["failed"]) == (7, 0)
    settings = found["settings"]
    assert (settings["min_pixels"], settings["max_pixels"]) == (3136, 25088)
    printed = capsys.readouterr().out
    assert f"{expected.mean:.4f} +- {expected.standard_error:.4f}  7 of 7 rows" in printed
    assert '"prompt": "{question}"' in printed
    assert '"max_pixels": 25088' in printed


def test_letters_have_the_log_probabilities_of_the_plain_forward(run, model, table, out):
    prompt = "{question}{choices}"
    assert run(metrics="choice", columns={"reference": "letter"}, prompt=prompt) == 0
    row = tables.predictions(out)[1]
    asked = f"{row['question']}\nA. cat\nB. dog\nC. box\n{_ask_by_letter()}"
    loaded, transform, batch = alone(model, table.parent / row["image"], asked)
    (all_of_them,) = next_log_probs(loaded, batch)
    expected = [float(all_of_them[transform.encode(letter)[0]]) for letter in "ABC"]
    assert row["log_probs"] == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        logits = loaded(**batch)[0, -1].float()
    torch.testing.assert_close(all_of_them, logits.log_softmax(-1), atol=1e-5, rtol=0)
    assert row["scores"] == {"choice": float(expected.index(max(expected)) == 1)}
    assert row["answer"] == ""  # which nothing asked for


def _ask_by_letter():
    return "Answer with the option's letter from the given choices directly."


def test_letters_and_answers_in_one_run(run, out):
    columns = {"columns": {"reference": "letter"}}
    assert run(metrics=["choice", "choice_by_answer"], **columns) == 0
    rows = tables.predictions(out)
    assert all(row["answer"] and len(row["log_probs"]) == 3 for row in rows)
    both = [row["log_probs"] for row in rows]
    assert run(metrics="choice", **columns) == 0
    assert [row["log_probs"] for row in tables.predictions(out)] == both


def test_boxes_are_scored_in_pixels_of_the_resized_image(model, tmp_path, monkeypatch):
    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Where?", "answer": [100, 50, 300, 150]}
    table = tables.write_rows(tmp_path / "t.jsonl", [row, row | {"answer": [[0, 0, 500, 9]]}])
    height, width = smart_resize(200, 400, min_pixels=3136, max_pixels=25088)
    assert (height, width) != (200, 400)
    said = f"[{width // 4}, {height // 4}, {3 * width // 4}, {3 * height // 4}]"

    def say(self, ended):
        answer = real(self, ended)
        return type(answer)(answer.question, "done", said, 9)

    real = _ask.Answerer._answer
    monkeypatch.setattr(_ask.Answerer, "_answer", say)
    assert tables.run(model, table, metrics="box_iou") == 1
    first, second = tables.predictions(tmp_path / "t_evaluation")
    assert first["scores"] == {"box_iou": 1.0}
    assert first["references"] == [json.loads(said)]
    assert second["state"] == "failed"
    assert "outside its image" in second["reason"]


def test_a_bad_image_is_one_failed_row(run, table, out, caplog):
    (table.parent / "images" / "picture 001.png").write_bytes(b"no picture")
    (table.parent / "images" / "picture 002.png").unlink()
    assert run() == 1
    found = tables.scores(out)
    assert (found["rows"], found["failed"]) == (7, 2)
    assert {score["n"] for score in found["scores"].values()} == {5}
    rows = tables.predictions(out)
    assert [row["state"] for row in rows] == ["done", "failed", "failed", *["done"] * 4]
    assert "failed: q1: " in caplog.text
    page = (out / "page.html").read_text()
    assert page.count("<article>") == 7
    assert page.count("data:image/jpeg;base64") == 5
    Image.new("RGB", (60, 60)).save(table.parent / "images" / "picture 001.png")  # mended
    assert run() == 1
    assert tables.scores(out)["failed"] == 1


def test_the_page_shows_the_worst_first(run, table, out):
    assert run(review=4) == 0
    rows = tables.predictions(out)
    page = (out / "page.html").read_text()
    shown = [part.split(":")[0] for part in page.split("<h2>")[1:]]
    worst = sorted(rows, key=lambda row: row["scores"]["anls"])
    assert shown == [row["id"] for row in worst[:4]]
    assert "max_pixels" in page
    assert run(review=0, output_dir=str(out.with_name("none"))) == 0
    assert not (out.with_name("none") / "page.html").exists()


def test_other_metrics_and_references_ask_nothing_again(run, table, out, monkeypatch):
    assert run() == 0
    before = tables.predictions(out)
    monkeypatch.setattr(RunningBatch, "enter", lambda *_: pytest.fail("asked"))
    table.write_text(table.read_text().replace('"What is on it"', json.dumps(before[0]["answer"])))
    assert run(metrics=["exact_match"], limit=3) == 0
    rows = tables.predictions(out)
    assert [row["answer"] for row in rows] == [row["answer"] for row in before[:3]]
    assert rows[0]["scores"] == {"exact_match": 1.0}


def test_killed_and_started_again(run, out):
    """Whenever it is killed, it ends with the files of a run in one piece."""
    assert run() == 0
    right = tables.final(out)
    shutil.rmtree(out)
    moments = random.Random(0)
    for _ in range(4):
        child = fork(run)
        timer = threading.Timer(moments.uniform(0.05, 1), os.kill, (child, signal.SIGKILL))
        timer.start()
        exit_code(child)
        timer.cancel()
    assert run() == 0
    assert tables.final(out) == right


def test_two_ranks_leave_what_one_leaves(run, out):
    assert run() == 0
    right = tables.final(out)
    shutil.rmtree(out)
    assert on_ranks(2, run) == [0, 0]
    assert tables.final(out) == right


def test_what_cannot_be_is_refused_before_anything(run, table, out, caplog):
    for changes, said in (
        ({"metrics": ["bleu"]}, "metrics are of exact_match, anls"),
        ({"metrics": []}, "metrics are of"),
        ({"metrics": ["box_iou", "anls"]}, "no metric of texts goes with it"),
        ({"metrics": "box_iou"}, "row q0 (number 0): a reference is a box"),
        ({"metrics": "choice"}, "row q0 (number 0): the reference is the words of a choice"),
        ({"columns": {"reference": "nothing"}}, "row q0 (number 0): there is no reference in noth"),
        ({"columns": {"choices": "nothing"}}, "row q0 has no column 'nothing'"),
        ({"inputs": "a.csv"}, "give source or inputs"),
        ({"source": None}, "inputs are missing"),
        ({"source": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"limit": 0}, "limit is at least 1"),
        ({"anls_threshold": 1.5}, "anls_threshold is from 0 to 1"),
        ({"temperature": 1.0}, "unknown keys"),
    ):
        assert run(**changes) == 2, changes
        assert said in caplog.messages[-1], changes
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    tables.write_rows(table, [*rows, {**rows[0], "question_id": "q9", "answer": ""}])
    assert run() == 2
    assert caplog.messages[-1].startswith("row q9 (number 7): there is no reference in reference")
    assert not out.exists()


@pytest.mark.parametrize("metrics", ["choice", "anls"])
def test_a_model_without_numbers_stops_the_run(model, table, tmp_path, caplog, metrics):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    columns = {"reference": "letter"}
    assert tables.run(broken, table, metrics=metrics, columns=columns) == 2
    assert caplog.messages[-1].startswith("no answer of a batch is finite")


def test_a_row_for_which_memory_is_short_fails_alone(run, out, monkeypatch):
    right = RunningBatch.enter

    def short(self, prompts):
        if len(prompts) > 1 or len(prompts[0].sample["tokens"]) > 70:
            raise RuntimeError("out of memory")
        right(self, prompts)

    monkeypatch.setattr(RunningBatch, "enter", short)
    assert run() == 1
    rows = tables.predictions(out)
    assert {row["state"] for row in rows} == {"done", "failed"}
    assert all("lower max_pixels" in row["reason"] for row in rows if row["state"] == "failed")


def test_a_dry_run_leaves_nothing(run, out, capsys):
    assert run(dry_run=True) == 0
    assert "7 to be asked in 3 batches" in capsys.readouterr().out
    assert not out.exists()
