"""Runs of the recipe: tables to states and answers, each row in one recorded state."""

import csv
import errno
import json
import os
import random
import shutil
import signal
import threading
import time

import captions
import datasets
import numpy as np
import pytest
import questions
import torch
from forked import exit_code, fork
from on_ranks import on_ranks
from PIL import Image
from safetensors.torch import load_file, save_file
from torchtune.data import Message

from parity import reference
from torchtune_qwen25vl import generate, load_pretrained
from torchtune_qwen25vl.generation import inference_batch
from torchtune_qwen25vl.hidden_states import _extract, _run, hidden_states, open_states


def alone(model_folder, image, question, wanted, new_tokens=4):
    """States and answer of one question at batch 1, by the public calls."""
    model, transform = load_pretrained(model_folder)
    transform = type(transform).from_folder(model_folder, min_pixels=3136, max_pixels=25088)
    content = [{"type": "image", "content": one} for one in image]
    message = Message("user", [*content, {"type": "text", "content": question}])
    batch = inference_batch([[message]], transform)
    stop = transform.stop_tokens
    told = generate(model, batch, max_new_tokens=new_tokens, stop_tokens=stop)
    said = transform.decode(told.tokens[0, : told.lengths[0]].tolist()).strip()
    return hidden_states(model, batch, wanted), said


def test_states_and_answers_are_those_of_a_row_alone(run, model, table, out):
    assert run() == 0
    states = open_states(out)
    assert states.ids == [f"q{k}" for k in range(8)]
    assert states.selectors[0] == "vision/mean"
    assert states.truths[:3] == ["yes", "3.0", ""]
    for k in (0, 4, 7):
        image = Image.open(table.parent / "images" / f"picture {k:03}.png").convert("RGB")
        right, said = alone(model, [image], questions.ASKED[k % 3], states.selectors)
        assert states.answers[k] == said
        for name in states.selectors:
            scale = max(1.0, float(right[name].abs().max()))
            assert np.abs(states[name][k] - right[name][0].numpy()).max() < 2e-5 * scale


def test_answers_are_those_of_transformers(run, model, table, out):
    assert run(system_prompt="", max_new_tokens=24, wanted=["norm/last"]) == 0
    theirs = reference.load(str(model), torch.float32)
    processor = reference.processor(model, min_pixels=3136, max_pixels=25088)
    _, transform = load_pretrained(model)
    for k, said in enumerate(open_states(out).answers[:4]):
        image = Image.open(table.parent / "images" / f"picture {k:03}.png").convert("RGB")
        tokens = reference.answer(theirs, processor, questions.ASKED[k % 3], image)
        assert said == transform.decode(tokens).strip()
        assert said


def test_a_row_that_is_too_long_fails_alone(model, table, out, tmp_path):
    short = shutil.copytree(model, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 150}))
    table.write_text(
        table.read_text().replace("q2,picture 002.png,", "q2,picture 002.png," + 400 * "x")
    )
    assert questions.run(short, table) == 1
    rows = questions.entries(out)
    assert [row["state"] for row in rows] == ["done"] * 2 + ["failed"] + ["done"] * 5
    assert "max_seq_len" in rows[2]["reason"]


def test_every_row_ends_in_a_state(run, table, out, caplog):
    images = table.parent / "images"
    (images / "picture 001.png").write_bytes(b"no picture")
    (images / "picture 002.png").unlink()
    lines = table.read_text().splitlines()
    lines += ["q0,picture 000.png,Again?,no", "q9,,Without an image?,no", "q10,picture 003.png,,no"]
    table.write_text("\n".join(lines))
    assert run() == 1
    states = open_states(out)
    ended = dict(zip(states.ids, zip(states.states, states.reasons, strict=True), strict=True))
    assert "not an image" in ended["q1"][1]
    assert "no such file" in ended["q2"][1]
    assert "earlier row" in ended["q0#8"][1]
    assert ended["q10"] == ("failed", "the row has no question")
    assert ended["q9"] == ended["q0"] == ("done", "")
    assert np.isnan(states["layer.1/query_last"][[1, 2, 8, 10]]).all()
    assert np.isfinite(states["layer.1/query_last"][[0, 3, 9]]).all()
    assert np.isnan(states["layer.1/image_last"][9]).all()  # it has no image
    assert np.isnan(states["vision/mean"][9]).all()
    assert "failed: q2" in caplog.text
    assert run() == 1  # nothing is done again
    Image.new("RGB", (60, 60)).save(images / "picture 001.png")  # mended
    assert run() == 1
    assert open_states(out).states[1] == "done"


def test_edits_of_the_table_count(run, table, out):
    assert run() == 0
    before = questions.arrays(out)
    table.write_text(
        table.read_text().replace("q4,picture 004.png,What", "q4,picture 004.png,Which")
    )
    assert run() == 0
    after = questions.arrays(out)
    changed = (before["layer.1/query_last"] != after["layer.1/query_last"]).any(-1)
    assert changed.tolist() == [k == 4 for k in range(8)]


def test_a_table_that_grew_keeps_what_is_done(run, table, out, monkeypatch):
    """Wherever the new rows stand, and whatever row is gone."""
    head, *lines = table.read_text().splitlines()
    assert run() == 0
    right = dict(
        zip(open_states(out).ids, questions.arrays(out)["layer.1/query_last"], strict=True)
    )
    new = "q9,picture 003.png,Is it new?,yes"
    table.write_text("\n".join([head, new, *lines[4:], *lines[:3]]))
    asked = []
    generate = _extract.generate
    monkeypatch.setattr(
        _extract,
        "generate",
        lambda m, batch, **k: asked.append(len(batch["tokens"])) or generate(m, batch, **k),
    )
    assert run() == 0
    assert asked == [1]
    states = open_states(out)
    assert states.ids == ["q9", "q4", "q5", "q6", "q7", "q0", "q1", "q2"]
    for name, row in zip(states.ids[1:], states["layer.1/query_last"][1:], strict=True):
        assert np.array_equal(row, right[name])
    assert np.isfinite(states["layer.1/query_last"][0]).all()


def test_states_are_not_read_by_the_table_of_an_earlier_order(run, table, out, monkeypatch):
    """A run that ends between the states and their table leaves both, of other rows."""
    assert run() == 0
    right = questions.arrays(out)["layer.1/query_last"]
    head, *lines = table.read_text().splitlines()
    table.write_text("\n".join([head, *lines[::-1]]))

    def killed(*_):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(_run, "write_table", killed)
        assert run() == 2
    with pytest.raises(ValueError, match="has other rows than"):
        open_states(out).ids  # noqa: B018
    assert run() == 0
    assert open_states(out).ids == [f"q{k}" for k in reversed(range(8))]
    assert np.array_equal(questions.arrays(out)["layer.1/query_last"], right[::-1])


def test_another_run_leaves_the_earlier_one(run, out):
    assert run() == 0
    assert run(wanted=["norm/last"], max_new_tokens=0) == 0
    states = open_states(out)
    assert states.selectors == ["norm/last"]
    assert states.answers == [""] * 8
    assert {path.name for path in out.glob("earlier-*")} == {
        "earlier-1-journal-0.jsonl",
        "earlier-1-states.safetensors",
        "earlier-1-rows.jsonl",
    }


def test_whole_spans(run, out):
    assert run(wanted=["layer.1/image_all", "layer.1/image_mean", "vision.0/all"]) == 0
    states = open_states(out)
    for whole, mean in zip(states["layer.1/image_all"], states["layer.1/image_mean"], strict=True):
        assert np.allclose(whole.mean(0), mean, atol=1e-5)
    lengths = [len(one) for one in states["layer.1/image_all"]]
    assert [len(one) for one in states["vision.0/all"]] == [4 * length for length in lengths]
    assert len(set(lengths)) > 1


def test_bf16_stays_bf16(run, out):
    assert run(dtype="bf16", wanted=["layer.1/query_last"]) == 0
    column = open_states(out)["layer.1/query_last"]
    assert str(column.dtype) == "bfloat16"
    assert column.nbytes == 8 * column.shape[1] * 2
    assert isinstance(column, np.memmap)


@pytest.mark.parametrize("kind", ["jsonl", "json", "tsv", "parquet", "saved"])
def test_every_kind_of_table(run, model, table, tmp_path, kind):
    assert run() == 0
    right = questions.arrays(tmp_path / "questions_hidden_states")
    rows = list(csv.DictReader(table.open()))
    for row in rows:
        row["image"] = f"images/{row.pop('image_name')}"
    path = tmp_path / ("saved" if kind == "saved" else f"table.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "tsv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), dialect="excel-tab")
            writer.writeheader()
            writer.writerows(rows)
    else:
        held = [{**row, "image": str(table.parent / row["image"])} for row in rows]
        made = datasets.Dataset.from_list(held).cast_column("image", datasets.Image())
        made.to_parquet(path) if kind == "parquet" else made.save_to_disk(path)
    images_dir = None if kind != "tsv" else str(tmp_path)
    assert questions.run(model, path, images_dir=images_dir, output_dir=str(tmp_path / "o")) == 0
    found = questions.arrays(tmp_path / "o")
    assert all(np.array_equal(right[name], found[name]) for name in right)


def test_texts_stay_the_texts_of_the_file(run, model, tmp_path):
    rows = [
        {"question_id": 7, "question": "NaN", "answer": None, "score": 3.0, "image_id": "a"},
        {"question_id": "08", "question": "3.0", "answer": "1e5", "image_id": "b"},
    ]
    for name in "ab":
        Image.new("RGB", (60, 60)).save(tmp_path / f"{name}.jpg")  # found without their suffix
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"images_dir": None, "output_dir": str(tmp_path / "o")}
    assert questions.run(model, tmp_path / "t.jsonl", **keys) == 0
    found = questions.entries(tmp_path / "o")
    assert [row["id"] for row in found] == ["7", "08"]
    assert [row["question"] for row in found] == ["NaN", "3.0"]
    assert [row["truth"] for row in found] == ["", "1e5"]
    assert [row["image"] for row in found] == ["a", "b"]
    assert [row["columns"] for row in found] == [{"score": 3.0}, {}]


def test_several_images_a_row(model, tmp_path):
    captions.write_pictures(tmp_path, 2)
    names = ["picture 000.png", "picture 001.png"]
    row = {"question": "Which is larger?", "images": names}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    wanted = ["vision/mean", "layer.1/image_first", "layer.1/image_last", "layer.1/query_last"]
    keys = {"images_dir": None, "wanted": wanted, "output_dir": str(tmp_path / "o")}
    assert questions.run(model, tmp_path / "t.jsonl", **keys) == 0
    images = [Image.open(tmp_path / name).convert("RGB") for name in names]
    right, _ = alone(model, images, row["question"], wanted)
    states = open_states(tmp_path / "o")
    for name in wanted:
        assert np.allclose(states[name][0], right[name][0].numpy(), atol=2e-5)


def test_system_prompt_and_template(run, model, table, out):
    assert run(system_prompt="Be short.", prompt="{question} Say {gt_answer}?", dry_run=True) == 1
    assert run(prompt="{question} One word.", max_new_tokens=0, wanted=["norm/last"]) == 0
    image = Image.open(table.parent / "images" / "picture 000.png").convert("RGB")
    right, _ = alone(model, [image], f"{questions.ASKED[0]} One word.", ["norm/last"])
    assert np.allclose(open_states(out)["norm/last"][0], right["norm/last"][0].numpy(), atol=2e-5)


def test_a_dry_run_and_a_test_run_leave_the_folder_alone(run, out, capsys):
    assert run(dry_run=True) == 0
    assert "8 to be asked in 3 batches" in capsys.readouterr().out
    assert not out.exists()
    assert run(test=True) == 0
    assert open_states(out / "test").ids == ["q0", "q1", "q2"]
    assert [path.name for path in out.iterdir()] == ["test"]


def test_what_cannot_be_is_refused_before_anything(run, out, caplog):
    for changes, said in (
        ({"wanted": ["layer.9/last"]}, "there are blocks 0 to 1"),
        ({"wanted": ["norm/last"], "format": "halp"}, "take these out of wanted"),
        ({"wanted": []}, "wanted is a list"),
        ({"inputs": ["nowhere.csv"]}, "nowhere.csv does not exist"),
        ({"columns": {"question": "asked"}}, "no column 'asked'"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"vision_boundary": "middle"}, "vision_boundary"),
        ({"batch": 3}, "unknown keys"),
    ):
        assert run(**changes) == 2
        assert said in caplog.messages[-1], changes
        assert "Traceback" not in caplog.text
    assert not out.exists()


@pytest.mark.parametrize("new_tokens", [0, 2])
def test_a_model_without_numbers_stops_the_run(model, table, out, tmp_path, caplog, new_tokens):
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    wanted = ["norm/last", "vision/mean"]
    assert questions.run(broken, table, max_new_tokens=new_tokens, wanted=wanted) == 2
    assert caplog.messages[-1].startswith("no answer of a batch is finite")


def test_a_row_for_which_memory_is_short_fails_alone(run, out, monkeypatch):
    right = _extract.prompt_batch

    def short(samples, *arguments, **options):
        if len(samples) > 1 or len(samples[0]["tokens"]) > 60:
            raise RuntimeError("out of memory")
        return right(samples, *arguments, **options)

    monkeypatch.setattr(_extract, "prompt_batch", short)
    assert run() == 1
    rows = questions.entries(out)
    assert {row["state"] for row in rows} == {"done", "failed"}
    assert all("lower max_pixels" in row["reason"] for row in rows if row["state"] == "failed")


def test_a_full_disk_is_one_line_and_loses_nothing(run, out, monkeypatch, caplog):
    from torchtune_qwen25vl.hidden_states import _columns

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_columns, "_write", full)
        assert run() == 2
    assert caplog.messages[-1].startswith("the disk is full")
    assert run() == 0
    assert set(open_states(out).states) == {"done"}


def test_killed_twenty_times(run, out):
    """Whenever it is killed, it ends with the arrays and answers of a run in one piece."""
    start = time.perf_counter()
    assert run() == 0
    seconds = time.perf_counter() - start
    right, rows = questions.arrays(out), questions.entries(out)
    shutil.rmtree(out)
    moments = random.Random(0)
    for _ in range(20):
        child = fork(run)
        timer = threading.Timer(moments.uniform(0, seconds), os.kill, (child, signal.SIGKILL))
        timer.start()
        exit_code(child)
        timer.cancel()
        if moments.random() < 0.3:
            assert run() == 0
            found = questions.arrays(out)
            assert all(np.array_equal(right[name], found[name]) for name in right)
            assert questions.entries(out) == rows
            shutil.rmtree(out)


def test_two_ranks_leave_what_one_leaves(run, table, out):
    (table.parent / "images" / "picture 003.png").unlink()
    wanted = ["halp", "layer.1/image_all"]
    assert run(wanted=wanted) == 1
    right, rows = open_states(out), questions.entries(out)
    right = {name: [np.array(row) for row in right[name]] for name in right.selectors}
    shutil.rmtree(out)
    assert on_ranks(2, lambda: run(wanted=wanted)) == [1, 1]
    found = open_states(out)
    for name, expected in right.items():
        pairs = zip(expected, found[name], strict=True)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in pairs), name
    for mine, theirs in zip(questions.entries(out), rows, strict=True):
        assert {**mine, "places": 0} == {**theirs, "places": 0}


def test_states_that_are_gone_or_others_are_refused(run, out, caplog):
    assert run() == 0
    content = (out / "states.safetensors").read_bytes()
    (out / "states.safetensors").write_bytes(content[:-8])
    assert run() == 2
    assert "is cut short" in caplog.messages[-1]
    with pytest.raises(ValueError, match="cut short"):
        open_states(out)
    (out / "states.safetensors").unlink()
    assert run() == 2
    assert "is gone: put it back" in caplog.messages[-1]
    assert run(restart=True) == 0


def test_the_file_is_plain_safetensors(run, out):
    assert run(dtype="bf16") == 0
    loaded = load_file(out / "states.safetensors")
    states = open_states(out)
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.bfloat16
        assert np.array_equal(tensor.float().numpy(), np.asarray(states[name], np.float32))
