"""The job: prompts of every form to files, resumed, killed, refused."""

import importlib
import json
import logging
import os
import shutil
import signal

import files
import pytest
import tiny_folder
import torch
from forked import exit_code, fork
from on_ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from parity import photos
from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.conditioning import PromptEncoder, _run, read_embeds

recipe = importlib.import_module("torchtune_qwen25vl.recipes.embed_prompts")
PROMPTS = ["A red box.", "", 'Two blue boxes, on white; "quoted".', "猫 ☕", "A red box again."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.write_folder(tmp_path_factory.mktemp("tiny") / "model [1]", tied=False)


@pytest.fixture(scope="module")
def encoder(folder):
    return PromptEncoder(*load_pretrained(folder))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of somebody's, from which relative paths start."""
    monkeypatch.chdir(tmp_path)
    logging.getLogger().setLevel(logging.INFO)
    return tmp_path


@pytest.fixture
def table(place):
    lines = [json.dumps({"id": k, "prompt": text}) for k, text in enumerate(PROMPTS)]
    (place / "prompts.jsonl").write_text("\n".join(lines))
    return "prompts.jsonl"


@pytest.fixture
def run(folder):
    """`embed-prompts WORD...`; its exit code."""

    def call(*words, model=folder):
        small = ["device=cpu", "workers=0", "batch_size=2"]
        return recipe.main([f"model={model}", *small, *words])

    return call


def contents(out):
    """What the files hold; the order of their facts is not the same in every process."""
    found = {path.name: read_embeds(path) for path in sorted(out.glob("*.safetensors"))}
    return {
        name: (one.embeds.tolist(), one.mask.tolist(), one.facts) for name, one in found.items()
    }


def test_a_table(run, table, place, encoder):
    assert run(table) == 0
    out = place / "prompts_prompt_embeds"
    for number, text in enumerate(PROMPTS):
        stored = read_embeds(out / f"{number}.safetensors")
        right, mask = encoder(text)
        torch.testing.assert_close(stored.embeds, right, rtol=0, atol=1e-5)
        assert torch.equal(stored.mask, mask)
        assert stored.facts["prompt"] == text
        assert stored.facts["task"] == "text_to_image"


def test_a_list_and_options(run, place, encoder):
    (place / "list.txt").write_text("One.\n\nThree <|im_end|> of them.\n")
    assert run("list.txt", "output_dir=out", "max_sequence_length=4", "compat=diffusers") == 0
    assert sorted(contents(place / "out")) == ["list-0.safetensors", "list-2.safetensors"]
    right, _ = encoder("Three <|im_end|> of them.", max_sequence_length=4, compat="diffusers")
    found = read_embeds(place / "out" / "list-2.safetensors").embeds
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("task", ["edit", "edit_plus"])
def test_a_folder_with_images_to_edit(run, place, encoder, task):
    (place / "p" / "sub").mkdir(parents=True)
    names = {"a": (60, 40), "sub/b": (30, 90)}
    for name, size in names.items():
        (place / "p" / f"{name}.txt").write_text(f"Change {name}.\n")
        photos.noise(*size).save(place / "p" / f"{name}.png")
    assert run("p", f"task={task}", "workers=1") == 0
    for name, size in names.items():
        stored = read_embeds(place / "p/_prompt_embeds" / f"{name.replace('/', '_')}.safetensors")
        right, _ = encoder(f"Change {name}.", [photos.noise(*size)], task=task)
        torch.testing.assert_close(stored.embeds, right, rtol=0, atol=2e-5)


def test_several_images_of_a_row(run, place, encoder):
    for k in range(2):
        photos.noise(40 + 9 * k, 60, seed=k).save(place / f"{k}.png")
    rows = [{"prompt": "Both.", "images": ["0.png", "1.png"]}, {"prompt": "None."}]
    (place / "t.json").write_text(json.dumps(rows))
    assert run("t.json", "task=edit_plus", "resize=False") == 0
    images = [photos.noise(40, 60), photos.noise(49, 60, seed=1)]
    right, _ = encoder("Both.", images, task="edit_plus", resize=False)
    found = read_embeds(place / "t_prompt_embeds" / "0.safetensors").embeds
    torch.testing.assert_close(found, right, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_cache_of_musubi_tuner(run, place, encoder, dtype, name):
    (place / "photo 1.txt").write_text("A cat.")
    (place / "t").mkdir()
    shutil.move(place / "photo 1.txt", place / "t")
    assert run("t", "layout=musubi", f"dtype={dtype}") in (0, 2)  # 2 where there is no bf16
    if dtype == "bf16" and not (place / "t/_prompt_embeds/photo 1_qi_te.safetensors").exists():
        pytest.skip("this machine has no bf16 of its own")
    path = place / "t/_prompt_embeds/photo 1_qi_te.safetensors"
    (key,) = load_file(path)
    assert key == f"varlen_vl_embed_{name}"
    assert load_file(path)[key].shape == encoder("A cat.")[0][0].shape
    with safe_open(path, "pt") as file:
        told = file.metadata()
    assert (told["architecture"], told["caption1"]) == ("qwen_image", "A cat.")
    assert told["format_version"] == "1.0.1"
    with pytest.raises(ValueError, match="is it a file of another layout"):
        read_embeds(path)


def test_a_single_file(run, table, place, folder, encoder):
    weights = files.hub_weights(folder)
    del weights["lm_head.weight"]
    save_file(weights, place / "encoder.safetensors")
    words = [f"tokenizer={folder}", f"config={folder}"]
    assert run(table, *words, model="encoder.safetensors") == 0
    found = read_embeds(place / "prompts_prompt_embeds" / "3.safetensors").embeds
    torch.testing.assert_close(found, encoder(PROMPTS[3])[0], rtol=0, atol=1e-5)


def test_what_is_done_is_done_once(run, table, place, caplog):
    assert run(table) == 0
    out = place / "prompts_prompt_embeds"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert run(table) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    (out / "1.safetensors").unlink()
    lines = (place / table).read_text().replace("A red box again.", "Another.")
    (place / table).write_text(lines)
    assert run(table) == 0
    changed = [p.name for p in before if p.stat().st_mtime_ns != before[p]]
    assert sorted(changed) == ["1.safetensors", "4.safetensors"]
    assert read_embeds(out / "4.safetensors").facts["prompt"] == "Another."
    assert run(table, "task=edit_plus") == 0  # another run
    assert read_embeds(out / "0.safetensors").facts["task"] == "edit_plus"


def test_killed_and_started_again(run, table, place, monkeypatch):
    assert run(table, "output_dir=whole") == 0
    whole = contents(place / "whole")

    def dies():
        write, left = _run.write_embeds, [1, 1, 1]

        def dying(*args, **kwargs):
            write(*args, **kwargs)
            left.pop()
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(_run, "write_embeds", dying)
        return run(table, "output_dir=out")

    assert exit_code(fork(dies)) == -signal.SIGKILL
    assert len(contents(place / "out")) == 3
    assert run(table, "output_dir=out") == 0
    assert contents(place / "out") == whole


def test_bad_rows_end_in_a_state_and_stop_nothing(run, place, caplog):
    (place / "bad.png").write_bytes(b"no image")
    photos.noise(40, 60).save(place / "good.png")
    rows = [
        {"name": "a", "prompt": "Good.", "image": "good.png"},
        {"name": "b", "prompt": "Bad.", "image": "bad.png"},
        {"name": "c", "prompt": "Gone.", "image": "gone.png"},
        {"name": "d", "prompt": "Without."},
        {"name": "A", "prompt": "Twice.", "image": "good.png"},
    ]
    (place / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run("t.jsonl", "task=edit") == 1
    assert sorted(contents(place / "t_prompt_embeds")) == ["a.safetensors"]
    said = [m for m in caplog.messages if m.startswith("failed: ")]
    assert [m.split(": ")[1] for m in said] == ["b", "c", "d", "A#4"]
    assert "edit takes 1 image for each prompt, got 0" in said[2]
    assert "an earlier prompt is called 'A' too" in said[3]
    photos.noise(50, 60).save(place / "bad.png")  # mended: tried again by itself
    assert run("t.jsonl", "task=edit") == 1
    assert sorted(contents(place / "t_prompt_embeds")) == ["a.safetensors", "b.safetensors"]


def test_two_ranks_leave_what_one_leaves(run, table, place):
    assert run(table, "output_dir=one") == 0
    assert on_ranks(2, lambda: run(table, "output_dir=two")) == [0, 0]
    one, two = (place / name for name in ("one", "two"))
    assert contents(one).keys() == contents(two).keys()
    for name in contents(one):
        found, right = read_embeds(two / name), read_embeds(one / name)
        torch.testing.assert_close(found.embeds, right.embeds, rtol=0, atol=1e-5)


def test_a_dry_run_leaves_nothing(run, table, place, capsys):
    assert run(table, "--dry-run") == 0
    assert "5 to be done in 3 batches" in capsys.readouterr().out
    assert not (place / "prompts_prompt_embeds").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=inpaint"], "task is "),
        (["min_pixels=3136"], "sizes of images are the task's, got min_pixels"),
        (["max_sequence_length=0"], "max_sequence_length is a number of tokens, got 0"),
        (["layout=diffsynth"], "layout is "),
        (["keep_fp8=True"], "keep_fp8 is for single files"),
        (["steps=3"], "unknown keys ['steps']"),
        (["columns={prompt: words}"], "has no column 'words'"),
    ],
)
def test_what_cannot_be_is_refused(run, table, caplog, words, message):
    assert run(table, *words) == 2
    assert message in caplog.messages[-1]


def test_inputs_that_are_none(run, place, caplog):
    assert run("gone.csv") == 2
    assert "an input is a table of prompts, gone.csv does not exist" in caplog.messages[-1]
    (place / "empty").mkdir()
    assert run("empty") == 2
    assert "there are no prompts in empty" in caplog.messages[-1]


def test_a_vision_tower_that_changed_is_another_run(folder, table, run, place):
    weights, config = files.hub_weights(folder), json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, place / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, is_vision in (("small.gguf", False), ("small-mmproj.gguf", True)):
        files.write_gguf(place / "model" / name, weights, config, is_vision=is_vision)
    asked = ["config=model/config.json", "tokenizer=model"]
    assert run(table, *asked, model="model/small.gguf") == 0
    written = {p: p.stat().st_mtime_ns for p in place.rglob("prompts_*/**/*.safetensors")}
    assert len(written) == len(PROMPTS)
    os.utime(place / "model" / "small-mmproj.gguf", ns=(1, 1))
    assert run(table, *asked, model="model/small.gguf") == 0
    assert all(path.stat().st_mtime_ns != before for path, before in written.items())
