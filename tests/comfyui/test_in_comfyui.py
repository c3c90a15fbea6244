"""The nodes in a real ComfyUI, against its own text encoder on the same file.

COMFYUI_PATH is a checkout of ComfyUI, COMFYUI_PYTHON the Python that runs it, in which this package
is installed; by default that of the tests. Nothing in the checkout is changed.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_folder
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from server import serving

from parity import photos
from torchtune_qwen25vl import comfyui

WORKFLOWS = sorted((Path(comfyui.__file__).parent / "workflows").glob("*.json"))
WIDTH, HEADS = 512, 4  # heads of 128, four of keys: what ComfyUI takes for a 7B
EXACT, RESAMPLED = 3e-5, 0.05  # of the largest value; ComfyUI resizes bilinearly and to other sides
TEXT = 'A red box, "Qwen" on it. 红色'
# 47 windows long and one high, and 384 * 384 pixels to a pixel: neither encoder resizes it
STRIP, TALL = photos.noise(1316, 112, seed=1), photos.noise(112, 1316, seed=2)
PHOTO = Image.fromarray(
    np.stack(np.meshgrid(np.arange(256), np.arange(192)), -1)[..., [0, 1, 0]].astype(np.uint8)
)  # smooth: resizing it one way or another is nearly the same


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI to run the nodes in")
    base = tmp_path_factory.mktemp("comfyui")
    folder = tiny_folder.write_folder(
        base / "models/text_encoders/tiny",
        tied=True,
        width=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()  # ComfyUI's own is taken
    probe = base / "custom_nodes/probe"
    probe.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("probe.py"), probe / "__init__.py")
    shutil.copyfile(folder / "config.json", probe / "config.json")
    (base / "input").mkdir()
    for name, image in {"strip": STRIP, "tall": TALL, "photo": PHOTO}.items():
        image.save(base / f"input/{name}.png")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    with serving(Path(os.environ["COMFYUI_PATH"]), python, base) as started:
        yield started


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


LOADERS = {
    "theirs": node("CLIPLoader", clip_name="tiny/model.safetensors", type="qwen_image"),
    "ours": node("Qwen25VLLoader", source="tiny", dtype="float32"),
    "vae": node("VAELoader", vae_name="pixel_space"),
    **{name: node("LoadImage", image=f"{name}.png") for name in ("strip", "tall", "photo")},
}


def embed(task, resize, text=TEXT, **inputs):
    links = {name: [value, 0] for name, value in inputs.items()}
    return node(
        "Qwen25VLTextEncode", encoder=["ours", 0], prompt=text, task=task, resize=resize, **links
    )


def saved(server, name):
    return load_file(server.base / f"output/{name}_00001_.safetensors")


def compare(server, name, ours, theirs):
    """Save both; return the embeddings of each, and what the node says of their difference."""
    workflow = LOADERS | {
        "a": ours,
        "b": theirs,
        "save a": node("Qwen25VLSaveConditioning", conditioning=["a", 0], filename_prefix=name),
        "save b": node(
            "Qwen25VLSaveConditioning", conditioning=["b", 0], filename_prefix=f"{name}-theirs"
        ),
        "said": node("Qwen25VLInspectConditioning", conditioning=["a", 0], other=["b", 0]),
    }
    said = server.run(workflow)["said"]["text"][0]
    print(f"{name}\n{said}")
    a, b = (saved(server, stem)["prompt_embeds"] for stem in (name, f"{name}-theirs"))
    return a, b, said


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_text_to_image(server):
    theirs = node("CLIPTextEncode", clip=["theirs", 0], text=TEXT)
    a, b, said = compare(server, "text", embed("text_to_image", True), theirs)
    assert a.shape == b.shape
    assert apart(a, b) < EXACT
    assert f"{apart(a, b):.4g} of the largest value" in said


def test_a_model_that_has_left_memory_comes_back(server):
    text = f"{TEXT} Again."  # what was embedded before is remembered
    server.free()
    theirs = node("CLIPTextEncode", clip=["theirs", 0], text=text)
    a, b, _ = compare(server, "again", embed("text_to_image", True, text), theirs)
    assert apart(a, b) < EXACT


@pytest.mark.parametrize("images", [("strip",), ("strip", "tall")], ids=len)
def test_edit_plus(server, images):
    """Several windows, whose order shows."""
    names = ("images", "images_2")
    ours = embed("edit_plus", False, **dict(zip(names, images, strict=False)))
    given = {f"image{i}": [name, 0] for i, name in enumerate(images, 1)}
    theirs = node("TextEncodeQwenImageEditPlus", clip=["theirs", 0], prompt=TEXT, **given)
    a, b, _ = compare(server, f"plus{len(images)}", ours, theirs)
    assert a.shape == b.shape
    assert apart(a, b) < EXACT


def test_edit(server):
    """At the sizes that each resizes to: here both come to 1176 * 896 pixels."""
    ours = embed("edit", True, images="photo", vae="vae")
    theirs = node("TextEncodeQwenImageEdit", clip=["theirs", 0], prompt=TEXT, image=["photo", 0])
    a, b, said = compare(server, "edit", ours, theirs)
    assert a.shape == b.shape
    assert apart(a, b) < RESAMPLED
    latent = saved(server, "edit")["reference_latents.0"]
    assert latent.shape == (1, 3, 896, 1184)
    assert f"reference latents: float32 {list(latent.shape)}" in said


def test_a_saved_conditioning_is_loaded(server):
    """By a workflow of its own, without an encoder."""
    embeds = torch.randn(1, 7, WIDTH)
    save_file({"prompt_embeds": embeds}, server.base / "input/kept.safetensors")
    workflow = {
        "kept": node("Qwen25VLLoadConditioning", file="kept.safetensors"),
        "saved": node("Qwen25VLSaveConditioning", conditioning=["kept", 0], filename_prefix="kept"),
    }
    server.run(workflow)
    assert torch.equal(saved(server, "kept")["prompt_embeds"], embeds)


def test_captions(server):
    asked = {"preset": "standard", "prompt": "", "sampling": "greedy", "temperature": 1.0}
    asked |= {"max_new_tokens": 6, "max_pixels": 1003520, "seed": 0}
    caption = node("Qwen25VLCaption", encoder=["ours", 0], images=["photo", 0], **asked)
    shown = node("PreviewAny", source=["caption", 0])
    outputs = server.run(LOADERS | {"caption": caption, "shown": shown})
    print(outputs["shown"]["text"])
    assert len(outputs["shown"]["text"]) == 1


def test_an_error_is_one_that_a_user_understands(server):
    encode = embed("edit", True, images="photo", images_2="photo")
    workflow = LOADERS | {
        "a": encode,
        "said": node("Qwen25VLInspectConditioning", conditioning=["a", 0]),
    }
    with pytest.raises(RuntimeError, match="ValueError: edit takes 1 image for each prompt, got 2"):
        server.run(workflow)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_workflows_load(server, path):
    """Every node is one that this ComfyUI has, with inputs that it takes, linked by their types."""
    nodes, known = json.loads(path.read_text()), server.nodes()
    for made in nodes.values():
        taken = known[made["class_type"]]["input"]
        allowed = taken["required"] | taken.get("optional", {})
        assert taken["required"].keys() <= made["inputs"].keys() <= allowed.keys()
        for key, value in made["inputs"].items():
            if isinstance(value, list):
                origin, output = nodes[value[0]]["class_type"], value[1]
                assert known[origin]["output"][output] == allowed[key][0]
