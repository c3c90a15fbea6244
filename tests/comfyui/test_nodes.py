"""What ComfyUI reads of all nodes, the workflows, and the encoder's own two nodes."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from host import Cancelled

from parity import photos
from torchtune_qwen25vl import comfyui
from torchtune_qwen25vl.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, _loader
from torchtune_qwen25vl.conditioning import PromptEncoder

WORKFLOWS = sorted((Path(comfyui.__file__).parent / "workflows").glob("*.json"))
TEXT = "A red box."
Loader, TextEncode = (NODE_CLASS_MAPPINGS[f"Qwen25VL{name}"] for name in ("Loader", "TextEncode"))


def image(*images):
    """An IMAGE of PIL images of one size."""
    return torch.from_numpy(np.stack(images)).float() / 255


class Vae:
    """Encodes an image to its mean colour, and remembers its size."""

    def __init__(self):
        self.sizes = []

    def encode(self, pixels):
        self.sizes.append(tuple(pixels.shape))
        return pixels.mean((1, 2))[:, :, None, None, None]


def test_every_node_has_a_name_to_show():
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_a_node_takes_what_it_says(host, name):
    """By the names of the inputs: those of `optional` have a default, those of `required` none."""
    node = NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    taken = inspect.signature(getattr(node, node.FUNCTION)).parameters
    defaults = {key: p.default is not p.empty for key, p in taken.items() if key != "self"}
    assert defaults == dict.fromkeys(inputs["required"], False) | dict.fromkeys(
        inputs.get("optional", {}), True
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_gives_our_nodes_what_they_take(host, path):
    nodes = json.loads(path.read_text())
    ours = [node for node in nodes.values() if node["class_type"] in NODE_CLASS_MAPPINGS]
    assert {node["class_type"] for node in ours} == {"Qwen25VLLoader", "Qwen25VLTextEncode"}
    for node in ours:
        inputs = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        allowed = inputs["required"] | inputs.get("optional", {})
        assert inputs["required"].keys() <= node["inputs"].keys() <= allowed.keys()
        for key, value in node["inputs"].items():
            kind = allowed[key][0]
            assert key == "source" or not isinstance(kind, list) or value in kind
    links = [v for node in nodes.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert links
    assert {origin for origin, _ in links} <= nodes.keys()


def test_the_list_of_text_encoders(host):
    first, second = host.encoders
    for path, content in {
        first / "one.safetensors": "",
        first / "deep/two.gguf": "",
        first / "deep/two-mmproj.gguf": "",
        first / "pickled.pt": "",
        first / "model/config.json": '{"model_type": "qwen2_5_vl"}',
        first / "model/model-00001-of-00002.safetensors": "",
        first / "t5/config.json": '{"model_type": "t5"}',
        first / "t5/model.safetensors": "",
        first / "broken/config.json": "{",
        second / "pipeline/text_encoder/config.json": '{"model_type": "qwen2_5_vl"}',
        second / "pipeline/text_encoder/model.safetensors": "",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    linked = second / "linked"
    linked.symlink_to(first / "model", target_is_directory=True)
    assert Loader.INPUT_TYPES()["required"]["source"][0] == [
        "linked",
        "model",
        "pipeline/text_encoder",
        "deep/two.gguf",
        "one.safetensors",
        "t5/model.safetensors",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_is_loaded(host, folder, dtype):
    (host.encoders[1] / "tiny").symlink_to(folder, target_is_directory=True)
    (managed,) = Loader().load("tiny", dtype)
    assert not host.loaded
    encoder = managed.ready()
    assert isinstance(encoder, PromptEncoder)
    assert str(encoder.dtype) == f"torch.{dtype}"
    assert host.loaded == [encoder.model]


def test_a_text_encoder_that_is_gone_is_refused(host):
    with pytest.raises(ValueError, match=r"text_encoders, .*clip, where gone\.gguf is not"):
        Loader().load("gone.gguf", "float32")


@pytest.mark.parametrize(
    ("beside", "given", "expected"),
    [
        ((), "", "bundled"),
        ((), " /of/mine ", "/of/mine"),
        (("a/tokenizer.json",), "", None),
        (("a/vocab.json",), "", None),
        (("tokenizer/tokenizer.json",), "", None),
        (("processor/tokenizer.json",), "", None),
        (("a/tokenizer.json",), "/of/mine", "/of/mine"),
    ],
)
@pytest.mark.parametrize("source", ["a/one.safetensors", "a"])
def test_the_tokenizer(host, monkeypatch, source, beside, given, expected):
    for name in ("a/one.safetensors", *beside):
        path = host.encoders[0] / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    calls = []

    def load(path, **options):
        calls.append((path, options))
        return PromptEncoder(torch.nn.Linear(1, 1), None)

    monkeypatch.setattr(_loader, "load_text_encoder", load)
    Loader().load(source, "float16", given, keep_fp8=True)
    (path, options) = calls[0]
    assert path == host.encoders[0] / source
    bundled = host.package / "text_encoders/qwen25_tokenizer"
    assert options == {
        "tokenizer": bundled if expected == "bundled" else expected,
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "keep_fp8": True,
    }


def test_a_prompt_is_embedded(host, encoder, plain):
    ((embeds, values),) = TextEncode().encode(encoder, TEXT, "text_to_image", True)[0]
    right, _ = plain(TEXT)
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds, right)
    assert values == {"pooled_output": None}
    assert host.loaded == [plain.model]
    assert host.bars == [(1, [0, 1])]


@pytest.mark.parametrize(
    ("task", "resize", "size"),
    [("edit", True, (1088, 960)), ("edit", False, (90, 80)), ("edit_plus", True, (1088, 960))],
)
def test_an_image_is_edited(host, encoder, plain, task, resize, size):
    """The VAE sees 1024 * 1024 pixels, with sides of 32, whatever the encoder sees."""
    photo, vae = photos.noise(90, 80), Vae()
    given = {"vae": vae, "images": image(photo)}
    ((embeds, values),) = TextEncode().encode(encoder, TEXT, task, resize, **given)[0]
    right, _ = plain(TEXT, [photo], task=task, resize=resize)
    assert torch.equal(embeds, right)
    width, height = size
    assert vae.sizes == [(1, height, width, 3)]
    (latent,) = values["reference_latents"]
    colour = torch.from_numpy(np.array(photo)).float().mean((0, 1)) / 255
    torch.testing.assert_close(latent.flatten(), colour, atol=0.02, rtol=0)


def test_images_come_in_batches_of_a_size(host, encoder, plain):
    """Each image of each batch is an image of the prompt; a fourth channel is left out."""
    first, second, third = photos.noise(56, 84), photos.noise(57, 84), photos.noise(84, 56)
    second = second.resize(first.size)
    alpha = torch.cat((image(third), torch.zeros(1, 56, 84, 1)), dim=-1)
    options = {"images": image(first, second), "images_3": alpha}
    ((embeds, values),) = TextEncode().encode(encoder, TEXT, "edit_plus", False, **options)[0]
    right, _ = plain(TEXT, [first, second, third], task="edit_plus", resize=False)
    assert torch.equal(embeds, right)
    assert values == {"pooled_output": None}


def test_colours_are_rounded(host, encoder, plain):
    """Those of an image that was made lie between those of a file."""
    photo = photos.noise(56, 84)
    between = image(photo) + torch.tensor([0.4, -0.4]).repeat(28)[:, None] / 255  # along a row
    ((embeds, _),) = TextEncode().encode(encoder, TEXT, "edit_plus", False, images=between)[0]
    assert torch.equal(embeds, plain(TEXT, [photo], task="edit_plus", resize=False)[0])


def test_a_vae_may_have_nothing_to_encode(host, encoder, plain):
    ((embeds, values),) = TextEncode().encode(encoder, TEXT, "edit_plus", True, vae=Vae())[0]
    assert torch.equal(embeds, plain(TEXT, task="edit_plus")[0])
    assert "reference_latents" not in values


def test_what_cannot_be_embedded_is_refused(host, encoder):
    photo = photos.noise(56, 84)
    with pytest.raises(ValueError, match="edit takes 1 image for each prompt, got 2"):
        TextEncode().encode(encoder, TEXT, "edit", True, images=image(photo, photo))
    with pytest.raises(ValueError, match=r"an IMAGE is .* got \[1, 56, 84\]"):
        TextEncode().encode(encoder, TEXT, "edit", True, images=torch.zeros(1, 56, 84))


def test_a_node_ends_when_it_is_cancelled(host, encoder):
    host.cancel_at, vae = 1, Vae()
    photo = photos.noise(56, 84)
    with pytest.raises(Cancelled):
        TextEncode().encode(
            encoder, TEXT, "edit_plus", True, images=image(photo, photo, photo), vae=vae
        )
    assert len(vae.sizes) == 1
