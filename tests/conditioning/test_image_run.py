"""The image recipe on tiny random pipelines: prompts to images, resumed, refused."""

import gc
import importlib
import logging
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from forked import exit_code, fork
from PIL import Image
from safetensors.torch import save_file

from parity import photos, reference
from parity.stages._stage import Setting
from parity.stages.conditioning import MODEL, Pair
from torchtune_qwen25vl import conditioning, jobs
from torchtune_qwen25vl.conditioning import Canvas, Memory, read_size
from torchtune_qwen25vl.model import Qwen25VL

recipe = importlib.import_module("torchtune_qwen25vl.recipes.image")
WORDS = ["device=cpu", "dtype=fp32", "workers=0", "size=48x32", "steps=2"]
PROMPTS = 'name,prompt\napple,A red apple.\ncats,"Two cats, one hat"\nempty,\n'


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Folders as diffusers saves them, by task."""
    base, processor = tmp_path_factory.mktemp("pipelines"), Pair(Setting()).processor
    for task in ("text_to_image", "edit_plus"):
        pipe = reference.whole_pipeline(task, reference.model(MODEL), processor, 96)
        pipe.save_pretrained(base / task)
    return base


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logging.getLogger().setLevel(logging.INFO)
    (tmp_path / "prompts.csv").write_text(PROMPTS)
    return tmp_path


@pytest.fixture
def run(pipelines):
    def call(*words, task="text_to_image"):
        return recipe.main([f"model={pipelines / task}", *WORDS, *words])

    return call


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_images_are_those_of_the_pipeline(run, pipelines, place):
    """With transformers' encoder in it: only rounding may differ, and a prompt draws its own."""
    assert run("prompts.csv") == 0
    pair = Pair(Setting())
    typed = reference.TypedTextEncoder(reference.model(MODEL))
    pipe = reference.whole_pipeline("text_to_image", typed, pair.processor, 96)
    pipe.set_progress_bar_config(disable=True)
    for name, prompt in {"apple": "A red apple.", "cats": "Two cats, one hat"}.items():
        chance = jobs.seeded(0, name, torch.device("cpu"))
        options = {"width": 48, "height": 32, "num_inference_steps": 2, "true_cfg_scale": 4.0}
        right = pipe(prompt, negative_prompt=" ", **options, generator=chance).images[0]
        found = pixels(place / "prompts_images" / f"{name}.png")
        assert np.abs(found - np.asarray(right).astype(int)).max() <= 1
    one, other = (pixels(place / "prompts_images" / f"{n}.png") for n in ("apple", "cats"))
    assert np.abs(one - other).max() > 10
    told = Image.open(place / "prompts_images/cats.png").text
    assert told == {"prompt": "Two cats, one hat", "note": "48x32, 2 steps, seed 0"}


def test_an_edit_and_a_bad_image(run, place, caplog, monkeypatch):
    plus = sys.modules[reference.PIPELINES["edit_plus"].__module__]
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 256 * 256)  # 1024 * 1024 take long
    photos.noise(60, 40).save(place / "a.png")
    (place / "b.png").write_bytes(b"no image")
    rows = "prompt,image,id\nMake it blue.,a.png,1\nMake it red.,b.png,2\n"
    (place / "edits.csv").write_text(rows)
    assert run("edits.csv", "true_cfg_scale=1", task="edit_plus") == 1
    out = place / "edits_images"
    assert pixels(out / "1.png").shape == (32, 48, 3)
    assert not (out / "2.png").exists()
    [failed] = [m for m in caplog.messages if m.startswith("failed: 2: ")]
    assert "b.png" in failed
    page = (out / "index.html").read_text()
    assert '<img src="1.png"' in page
    assert page.count('class="failed"') == 1
    assert not list((out / "prompt_embeds").glob("*negative*"))


def models():
    """All that are alive."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is Qwen25VL]


def test_the_encoder_is_gone_before_the_transformer_comes(run, place, monkeypatch):
    load, held = recipe.load_pipeline, []
    others = {id(model) for model in models()}

    def loading(*args):
        new = [model for model in models() if id(model) not in others]
        held.extend(p.device.type for model in new for p in model.parameters())
        return load(*args)

    monkeypatch.setattr(recipe, "load_pipeline", loading)
    assert run("prompts.csv") == 0
    assert set(held) <= {"meta"}


def test_killed_and_started_again(run, place, monkeypatch):
    assert run("prompts.csv", "output_dir=whole") == 0

    def dies():
        write = conditioning.write_image

        def dying(*args):
            write(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(conditioning, "write_image", dying)
        return run("prompts.csv", "output_dir=out")

    assert exit_code(fork(dies)) == -signal.SIGKILL
    assert run("prompts.csv", "output_dir=out") == 0
    images = {name: (place / name).glob("*.png") for name in ("whole", "out")}
    contents = {k: {p.name: p.read_bytes() for p in paths} for k, paths in images.items()}
    assert len(contents["whole"]) == 3
    assert contents["out"] == contents["whole"]
    times = {p: p.stat().st_mtime_ns for p in (place / "out").glob("*.png")}
    (place / "out/cats.png").unlink()
    shutil.rmtree(place / "out/prompt_embeds")  # nobody needs them any more
    assert run("prompts.csv", "output_dir=out") == 0
    assert (place / "out/cats.png").read_bytes() == contents["whole"]["cats.png"]
    again = [p.name for p in times if p.stat().st_mtime_ns != times[p]]
    assert again == ["cats.png"]


def adapter(place, prefix):
    """A LoRA of the tiny transformer, or of none."""
    torch.manual_seed(0)
    weights = {}
    for layer in range(2):
        for part, width in {"lora_A": (4, 32), "lora_B": (32, 4)}.items():
            name = f"{prefix}transformer_blocks.{layer}.attn.to_q.{part}.weight"
            weights[name] = torch.randn(width)
    save_file(weights, place / "light.safetensors")


def test_a_lora_counts(run, place, caplog):
    """And brings its own schedule: 8 steps without guidance."""
    (place / "one.csv").write_text("name,prompt\napple,A red apple.\n")
    words = [*WORDS[:-1], "one.csv"]
    adapter(place, "transformer.")
    assert run(*WORDS, "one.csv", "output_dir=without", "steps=8", "true_cfg_scale=1") == 0
    pipeline = [word for word in words if not word.startswith("steps")]
    assert run(*pipeline, "output_dir=with", "lora=light.safetensors", "steps=null") == 0
    assert Image.open(place / "with/apple.png").text["note"] == "48x32, 8 steps, seed 0"
    one, other = (pixels(place / name / "apple.png") for name in ("with", "without"))
    assert np.abs(one - other).max() > 1
    adapter(place, "unet.")
    assert run(*words, "output_dir=wrong", "lora=light.safetensors") == 2
    assert "has no weights for this transformer" in caplog.messages[-1]


def test_a_dry_run(run, place, capsys):
    assert run("prompts.csv", "--dry-run") == 0
    assert "3 to be done in 1 batches" in capsys.readouterr().out
    assert not (place / "prompts_images").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=100x96"], "sides are multiples of 16 pixels, got 100x96"),
        (["size=5:4"], "size is one of 1:1, 16:9, 9:16"),
        (["steps=0"], "steps are at least 1"),
        (["four_bit=on"], "four_bit means nothing to drawing"),
        (["preset=best"], "preset is "),
        (["model=."], "is a pipeline of diffusers, . has no model_index.json"),
        (["text_encoder=gone.safetensors"], "gone.safetensors"),
        (["lora=gone.safetensors"], "lora is a file of an adapter, gone.safetensors is none"),
    ],
)
def test_what_cannot_be_is_refused(run, caplog, words, message):
    assert run("prompts.csv", *words) == 2
    assert message in caplog.messages[-1]


def test_another_pipeline_is_refused(run, place, caplog):
    (place / "flux").mkdir()
    (place / "flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert run("prompts.csv", "model=flux") == 2
    assert re.search("is one of QwenImagePipeline, .* flux is FluxPipeline", caplog.messages[-1])


def test_sizes():
    assert read_size("16:9") == (1664, 928)
    assert read_size("640X480") == (640, 480)
    for text in ("", "x", "16:10", "0x16", "-16x16", "640x"):
        with pytest.raises(ValueError, match=r"size is one of|sides are multiples"):
            read_size(text)


def memory(free):
    """Of Qwen-Image itself in bf16."""
    return Memory(free=free, width=3072, vae_width=96, itemsize=2, context=512)


def test_memory():
    """Worked by hand: the VAE takes 45.2 * 96 * 2 bytes a pixel, a token 16 * 3072 * 2."""
    pixels = 1328 * 1328
    assert memory(0).needed(pixels, tiled=False) == pytest.approx(15.305e9, rel=1e-3)
    assert memory(0).needed(pixels, tiled=True) == pytest.approx((6889 + 512) * 98304, rel=1e-3)
    assert memory(16 * 10**9).fit(1328, 1328) == Canvas(1328, 1328)
    tiled = memory(10**9).fit(1328, 1328)
    assert (tiled.width, tiled.tiled) == (1328, True)
    assert "decoded in tiles, as 1.0 GB are free" in tiled.reason
    small = memory(6 * 10**8).fit(1664, 928)
    assert (small.width, small.height, small.tiled) == (1600, 880, True)
    assert "drawn at 1600x880 instead of 1664x928" in small.reason
    assert memory(0).needed(small.width * small.height, tiled=True) <= 6 * 10**8
    with pytest.raises(ValueError, match="not even small"):
        memory(10**8).fit(1328, 1328)
