"""The caption recipe from a folder of pictures to files, on a tiny model."""

import csv
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import captions
import pytest
import torch
from forked import exit_code, fork
from omegaconf import OmegaConf
from torchtune.data import Message

from torchtune_qwen25vl import Qwen25VLTransform, _cli, generate, load_pretrained, padded_collate
from torchtune_qwen25vl.captioning import Settings
from torchtune_qwen25vl.jobs import claimed, read_settings, read_words
from torchtune_qwen25vl.media import load_image
from torchtune_qwen25vl.transform._tokenizer import Qwen25VLTokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return captions.write_pictures(tmp_path_factory.mktemp("pictures") / "photos")


@pytest.fixture
def photos(originals, tmp_path):
    """A copy to write captions into."""
    return shutil.copytree(originals, tmp_path / "photos")


@pytest.fixture
def run(model, photos):
    """The recipe on these photos: keys and values to exit code."""

    def caption(*inputs, **changes):
        return captions.caption(model, inputs or photos, **changes)

    return caption


def words_to_config(words):
    """The config of a command line."""
    return read_words(words, captions.recipe.CONFIG, Settings)


def alone(model, path, prompt):
    """What a plain greedy `generate` says about one file."""
    network, transform = load_pretrained(model)
    transform = Qwen25VLTransform.from_folder(model, min_pixels=3136, max_pixels=25088)
    content = [
        {"type": "image", "content": load_image(path)},
        {"type": "text", "content": prompt},
    ]
    sample = transform({"messages": [Message("user", content)]}, inference=True)
    batch = padded_collate([sample], transform.pad_id, padding_side="left")
    said = generate(network, batch, max_new_tokens=12, stop_tokens=transform.stop_tokens)
    tokens = said.tokens[0, : said.lengths[0]].tolist()
    return transform.decode(tokens).strip()


def test_captions_are_those_of_each_image_alone(run, model, photos):
    assert run() == 0
    found = captions.rows(photos / "_captions")
    files = sorted(photos.glob("*.png"))
    assert [row["image"] for row in found] == list(map(str, files))
    for row, path in zip(found, files, strict=True):
        assert row["caption"] == alone(model, path, "What is on it?")
        assert path.with_suffix(".txt").read_text("utf-8") == row["caption"] + "\n"
    assert len({row["caption"] for row in found}) > 4  # the control: captions do differ
    assert {row["state"] for row in found} >= {"done", "cut"}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batches_change_nothing(run, photos, tmp_path, batch_size):
    run(output_dir=str(tmp_path / "a"), outputs=["jsonl"])
    run(output_dir=str(tmp_path / "b"), outputs=["jsonl"], batch_size=batch_size)
    assert captions.rows(tmp_path / "a") == captions.rows(tmp_path / "b")


def test_worker_processes_change_nothing(run, photos, tmp_path):
    run(output_dir=str(tmp_path / "a"), outputs=["jsonl"])
    run(output_dir=str(tmp_path / "b"), outputs=["jsonl"], workers=2)
    assert captions.final_files(tmp_path / "a") == captions.final_files(tmp_path / "b")


def test_a_second_run_has_nothing_to_do(run, photos, monkeypatch):
    run()
    before = captions.final_files(photos)
    monkeypatch.setattr("torchtune_qwen25vl.device._loading.load", lambda *_: pytest.fail("loaded"))
    assert run() == 0
    assert captions.final_files(photos) == before


def test_new_images_join_those_that_are_done(run, photos):
    run()
    before = captions.rows(photos / "_captions")
    captions.write_pictures(photos / "more", 2, seed=1)
    assert run() == 0
    after = captions.rows(photos / "_captions")
    assert len(after) == len(before) + 2
    assert [row for row in after if "more" not in row["image"]] == before


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append", "prepend"])
def test_existing_captions(run, photos, existing):
    text = photos / "picture 001.txt"
    text.write_text("Mine.\n", "utf-8")
    run(existing="overwrite", output_dir=str(photos / "_new"))
    new = text.read_text("utf-8").strip()
    text.write_text("Mine.\n", "utf-8")
    (photos / "picture 002.txt").write_text("  \n")  # no caption at all
    run(existing=existing)
    expected = {
        "skip": "Mine.",
        "overwrite": new,
        "append": f"Mine. {new}",
        "prepend": f"{new} Mine.",
    }
    assert text.read_text("utf-8").strip() == expected[existing]
    states = captions.states(photos / "_captions")
    assert (states["picture 001.png"] == "skipped") == (existing == "skip")
    if existing != "skip":  # where only one text was emptied, the others have captions by now
        assert "skipped" not in states.values()
    else:
        assert states["picture 002.png"] != "skipped"


def test_appending_happens_once(run, photos):
    text = photos / "picture 001.txt"
    text.write_text("Mine.", "utf-8")
    run(existing="append")
    once = text.read_text("utf-8")
    run(existing="append")
    assert text.read_text("utf-8") == once


def test_other_settings_begin_another_run_and_keep_the_journal(run, photos):
    run(existing="overwrite")
    first = captions.rows(photos / "_captions")
    run(existing="overwrite", prompt="Other?")
    assert captions.rows(photos / "_captions") != first
    assert list((photos / "_captions").glob("earlier-1-journal-0.jsonl"))
    run(existing="overwrite", prompt="Other?", restart=True)
    assert list((photos / "_captions").glob("earlier-2-journal-0.jsonl"))


def test_one_bad_file_fails_alone_and_is_retried_once_mended(run, photos, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    (photos / "bad.jpg").write_bytes(b"no picture")
    assert run() == 1
    row = captions.rows(photos / "_captions")[0]
    assert row["state"] == "failed"
    assert "bad.jpg" in row["reason"]
    assert list(captions.states(photos / "_captions").values()).count("failed") == 1
    assert caplog.messages[-2].startswith(f"failed: {photos / 'bad.jpg'}: ")
    assert caplog.messages[-1].startswith("9 images: ")
    with monkeypatch.context() as patch:  # as it was, it is not tried again by itself
        patch.setattr("torchtune_qwen25vl.captioning._run.failure", lambda *_: pytest.fail("read"))
        assert run() == 1
    shutil.copy(photos / "picture 000.png", photos / "bad.jpg")
    assert run() == 0
    assert (photos / "bad.txt").read_text() == (photos / "picture 000.txt").read_text()


def test_a_text_file_that_cannot_be_fails_alone(run, photos):
    (photos / "picture 003.txt").mkdir()
    assert run(existing="overwrite") == 1
    row = captions.rows(photos / "_captions")[3]
    assert row["state"] == "failed"
    assert "its text file cannot be read: [Errno 21]" in row["reason"]


def test_dry_run_touches_nothing(run, photos, capsys):
    (photos / "picture 001.txt").write_text("Mine.")
    (photos / "bad.jpg").write_bytes(b"no picture")
    before = captions.final_files(photos)
    assert run(dry_run=True) == 1
    assert captions.final_files(photos) == before
    assert not (photos / "_captions").exists()
    lines = capsys.readouterr().out.splitlines()
    assert f"{photos}/picture 000.png: to be captioned, {photos}/picture 000.txt" in lines
    assert f"{photos}/picture 001.png: skipped, it has a caption" in lines
    assert lines[0].startswith(f"{photos}/bad.jpg: failed, ")
    assert lines[-1] == "7 to be captioned in 3 batches; 1 skipped, 1 failed"


def test_tables_and_mirror(run, photos, tmp_path):
    captions.write_pictures(photos / "inner", 1, seed=1)
    mirror = tmp_path / "mirror"
    run(outputs=["txt", "jsonl", "csv"], mirror_dir=str(mirror), text_naming="full")
    assert not list(photos.glob("*.txt"))
    found = captions.rows(photos / "_captions")
    assert (mirror / "inner" / "picture 000.png.txt").read_text().strip() == found[-1]["caption"]
    with (photos / "_captions" / "captions.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [
        {**row, "tokens": str(row["tokens"]), "max_pixels": str(row["max_pixels"])} for row in found
    ] == table


def test_wording_around_and_variables_inside(run, photos, monkeypatch):
    asked = []
    tokenize = Qwen25VLTokenizer.tokenize_messages

    def record(self, messages, **kwargs):
        asked.append([(m.role, m.text_content) for m in messages])
        return tokenize(self, messages, **kwargs)

    monkeypatch.setattr(Qwen25VLTokenizer, "tokenize_messages", record)
    (photos / "picture 001.txt").write_text("Mine.", "utf-8")
    run(
        prompt="{name} in {directory}: {caption}",
        system_prompt="Be kind.",
        language="French",
        prefix="<",
        trigger="ohwx",
        suffix=">",
        existing="append",
    )
    assert [
        ("system", "Be kind."),
        ("user", "picture 001 in photos: Mine. Answer in French."),
    ] in asked
    text = (photos / "picture 001.txt").read_text("utf-8").strip()
    assert text.startswith("ohwx, Mine. <")  # the trigger word leads
    assert text.endswith(">")


def test_tables_and_lists_as_input(run, photos, tmp_path):
    names = ["picture 002.png", "picture 000.png", "absent.png"]
    table = photos / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "tags", "caption"], *([name, "a, b", ""] for name in names)])
    assert run(table, outputs=["jsonl"], output_dir=str(tmp_path / "out")) == 1
    assert list(captions.states(tmp_path / "out")) == names
    assert captions.states(tmp_path / "out")["absent.png"] == "failed"
    listed = photos / "list.txt"
    listed.write_text("\n".join(names))
    run(listed, outputs=["jsonl"], output_dir=str(tmp_path / "out2"))
    of_table = captions.rows(tmp_path / "out")
    assert [row.pop("tags") for row in of_table] == ["a, b"] * 3  # other columns are kept
    assert captions.rows(tmp_path / "out2") == of_table


def test_creative_is_sampled_and_repeatable(run, photos, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        changes = {
            "preset": "creative",
            "top_k": 5,
            "seed": seed,
            "output_dir": str(tmp_path / name),
        }
        run(str(photos / "*[0-2].png"), outputs=["jsonl"], **changes)
    a, b, c = (captions.rows(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_sampled_captions_do_not_depend_on_their_batch(run, photos, tmp_path):
    """An image draws from a chance of its own; the control of the seed is above."""
    changes = {"preset": "creative", "top_k": 5, "outputs": ["jsonl"]}
    for size in (1, 3, 8):
        run(batch_size=size, output_dir=str(tmp_path / str(size)), **changes)
    alone, *batches = (captions.rows(tmp_path / str(size)) for size in (1, 3, 8))
    assert batches == [alone, alone]
    assert len({row["caption"] for row in alone}) > 4


def test_short_command_and_recipe_are_the_same(model, photos, tmp_path, monkeypatch, capsys):
    keys = [f"model={model}", f"output_dir={tmp_path / 'a'}", "outputs=[jsonl]", "device=cpu"]
    keys += ["min_pixels=3136", "max_pixels=25088", "max_new_tokens=4", "workers=0"]
    assert _cli.caption([str(photos), *keys]) == 0
    keys[1] = f"output_dir={tmp_path / 'b'}"
    words = ["tune-qwen25vl", "run", "caption", "--config", "caption", f"inputs={photos}", *keys]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as done:
        _cli.main()
    assert done.value.code == 0
    assert captions.final_files(tmp_path / "a") == captions.final_files(tmp_path / "b")
    assert _cli.caption([str(photos), "--dry-run", *keys]) == 0
    assert _cli.caption(["--help"]) == 0
    assert "batch_tokens" in capsys.readouterr().out


def test_nothing_behind_a_key_is_an_empty_text():
    """Where null would be the model's own system prompt."""
    cfg = words_to_config(["photos", "system_prompt=", "prefix=", "language=null"])
    assert (cfg.system_prompt, cfg.prefix, cfg.language) == ("", "", None)


def test_on_and_off_are_words(model, photos):
    cfg = OmegaConf.merge(captions.config(model, photos), OmegaConf.create("four_bit: off"))
    assert cfg.four_bit is False
    assert read_settings(cfg, Settings).four_bit == "off"
    with pytest.raises(ValueError, match=r"inputs are paths, got \[1\]"):
        read_settings(OmegaConf.merge(cfg, {"inputs": [1]}), Settings)


def test_texts_are_taken_as_typed():
    typed = {
        "prefix": "Photo: ",
        "suffix": ", high quality",
        "prompt": "{name} in {directory}: say it. # short ${a} = b",
        "trigger": "on",
    }
    cfg = words_to_config(
        ["a b", "--dry-run", "top_p=0.5", *(f"{k}={v}" for k, v in typed.items())]
    )
    assert {key: cfg[key] for key in typed} == typed
    assert (cfg.inputs, cfg.dry_run, cfg.top_p) == (["a b"], True, 0.5)
    with pytest.raises(ValueError, match=r"top_k=\[1 is no value"):
        words_to_config(["photos", "top_k=[1"])
    assert words_to_config(["inputs=2024 #1"]).inputs == "2024 #1"
    assert words_to_config(["inputs=[a,b]"]).inputs == ["a", "b"]
    for word in ("--output-dir", "--trigger"):
        with pytest.raises(ValueError, match=f"{word} needs a value: write {word}=VALUE"):
            words_to_config(["photos", word, "out"])
    with pytest.raises(ValueError, match="--config needs a YAML"):
        words_to_config(["photos", "--config", "/nowhere.yaml"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": ["tx"]}, "outputs is of txt, jsonl, csv"),
        ({"existing": "keep"}, "existing is Literal['skip', "),
        ({"preset": "long"}, "preset is one of standard"),
        ({"prompt": "{nmae}"}, "this one holds {nmae}"),
        ({"prompt": "{"}, "cannot be read"),
        ({"min_pixels": 50000}, "min_pixels <= max_pixels"),
        ({"colour": 1}, "unknown keys"),
        ({"inputs": ["/nowhere"]}, "/nowhere does not"),
        ({"device": "cuda"}, "cannot use cuda"),
        ({"device": "gpu"}, "device is auto, cpu"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"seconds_per_image": 0}, "seconds_per_image is more than 0"),
        ({"workers": -1}, "workers is at least 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is int | None, got 'many'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 (greedy) or larger"),
        ({"prefix": {"Photo": None}}, "prefix is str, got {'Photo': None}"),
        ({"columns": {"txt": "x"}}, "columns has another"),
        ({"outputs": "txt"}, "outputs is list, got 'txt'"),
    ],
)
def test_what_cannot_be_is_refused(run, caplog, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the output folder of inputs that are no folder would be
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    inputs = changes.pop("inputs", ())
    assert run(*inputs, **changes) == 2
    assert message in caplog.text


def test_two_runs_at_once_are_refused(run, photos, caplog):
    folder = photos / "_captions"
    folder.mkdir()
    reading, writing = os.pipe()

    def other_run():
        with claimed(folder):
            os.write(writing, b".")
            os.read(os.pipe()[0], 1)  # until it is killed

    child = fork(other_run)
    os.read(reading, 1)
    try:
        assert run() == 2
    finally:
        os.kill(child, 9)
        exit_code(child)
    assert "another run is at work" in caplog.text
    assert run() == 0


def test_json_of_the_table_is_plain_utf8(run, photos):
    run(prefix="ä✓ ")
    text = (photos / "_captions" / "captions.jsonl").read_bytes()
    assert "ä✓ ".encode() in text
    assert json.loads(text.splitlines()[0])["caption"].startswith("ä✓ ")
    assert (photos / "picture 000.txt").read_bytes().startswith("ä✓ ".encode())


def test_paths_are_absolute(run, photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    run("photos")
    assert Path(captions.rows(photos / "_captions")[0]["image"]).is_absolute()


def test_patterns_to_exclude(run, photos, tmp_path):
    run(exclude="* 00[0-5].png", outputs=["jsonl"], output_dir=str(tmp_path / "out"))
    assert list(captions.states(tmp_path / "out")) == ["picture 006.png", "picture 007.png"]
    assert words_to_config(["photos", "exclude=*.gif"]).exclude == "*.gif"
    assert words_to_config(["photos", "exclude=['*.gif',b]"]).exclude == ["*.gif", "b"]


def test_what_the_model_asks_for_and_captions_do_not_follow_is_said(run, photos, model, caplog):
    caplog.set_level(logging.INFO)
    file = model / "generation_config.json"
    before = file.read_text() if file.exists() else None
    file.write_text(json.dumps({"repetition_penalty": 1.05, "do_sample": False}))
    try:
        assert run() == 0
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert "asks for repetition_penalty 1.05; captions are chosen as preset" in caplog.text
