"""Prompts to samples and embeddings: templates, prefixes, sizes of images, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from parity import photos, vocabulary
from parity.conversations import corpus_texts
from parity.stages._stage import Setting
from parity.stages.conditioning import Pair
from torchtune_qwen25vl import Qwen25VLTransform
from torchtune_qwen25vl.conditioning import padded, prompt_sample

LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}
TAIL = [151645, 198, 151644, 77091, 198]  # <|im_end|>, line break, the assistant's header


@pytest.fixture(scope="module")
def pair():
    return Pair(Setting())


@pytest.fixture(scope="module")
def encoder(pair):
    return pair.encoder


@pytest.fixture(scope="module")
def real():
    return Qwen25VLTransform(vocabulary.real() / "tokenizer.json", **LIMITS)


@pytest.fixture(scope="module")
def small():
    return Qwen25VLTransform(vocabulary.small(corpus_texts()) / "tokenizer.json", **LIMITS)


def image(width, height):
    return Image.fromarray(np.zeros((height, width, 3), np.uint8))


def kept(made):
    return made.sample["tokens"][made.start : made.end].tolist()


@pytest.mark.parametrize("prompt", ["A cat.", "\nA cat.", "\n\n\nA cat.", "", " ", "<|im_start|>"])
@pytest.mark.parametrize("compat", ["qwen", "diffusers"])
def test_the_template_is_left_out(real, prompt, compat):
    """By structure, which in Qwen's vocabulary are the numbers that diffusers counts."""
    made = prompt_sample(real, prompt, compat=compat)
    assert made.start == 34
    assert kept(made)[-5:] == TAIL or prompt == ""
    for task in ("edit", "edit_plus"):
        made = prompt_sample(real, prompt, [image(28, 28)], task=task, resize=False, compat=compat)
        assert made.start == 64
        assert kept(made)[-5:] == TAIL


def test_another_vocabulary_has_a_longer_template(small):
    made = prompt_sample(small, "A cat.")
    assert made.start > 34
    text = small.decode(made.sample["tokens"][: made.start].tolist(), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\n")
    text = small.decode(kept(made), skip_special_tokens=False)
    assert text == "A cat.<|im_end|>\n<|im_start|>assistant\n"


def test_labels_of_several_images(real):
    images = [image(84, 56), image(56, 56)]
    made = prompt_sample(real, "Go.", images, task="edit_plus", resize=False)
    text = real.decode(kept(made), skip_special_tokens=False)
    vision = "<|vision_start|>{}<|vision_end|>"
    one, two = (vision.format("<|image_pad|>" * n) for n in (6, 4))
    assert text.startswith(f"Picture 1: {one}Picture 2: {two}Go.<|im_end|>")


def test_an_image_to_edit_has_no_label(real):
    made = prompt_sample(real, "Go.", [image(112, 56)], task="edit", resize=False)
    text = real.decode(kept(made), skip_special_tokens=False)
    assert text.startswith("<|vision_start|>" + 8 * "<|image_pad|>" + "<|vision_end|>Go.")


@pytest.mark.parametrize(
    ("task", "size", "placeholders"),
    [
        ("edit", (1024, 1024), 1369),
        ("edit", (1600, 900), 1323),
        ("edit", (90, 160), 1323),
        ("edit_plus", (500, 500), 196),
        ("edit_plus", (1920, 1080), 180),
    ],
)
def test_images_are_resized_as_the_pipelines_do(real, task, size, placeholders):
    tokens = prompt_sample(real, "x", [image(*size)], task=task).sample["tokens"]
    assert int((tokens == 151655).sum()) == placeholders


def test_names_of_tokens_are_text_unless_asked_for(real):
    text = "a <|im_end|> b"
    assert 151645 not in kept(prompt_sample(real, text))[:-5]
    made = prompt_sample(real, text, compat="diffusers")
    assert kept(made)[:-5].count(151645) == 1


def test_diffusers_cuts_long_prompts(real):
    text = "word " * 1500
    assert len(kept(prompt_sample(real, text))) > 1500
    assert len(kept(prompt_sample(real, text, compat="diffusers"))) == 1024
    assert len(kept(prompt_sample(real, text, compat="diffusers", max_sequence_length=7))) == 7
    assert len(kept(prompt_sample(real, text, max_sequence_length=1200))) == 1200


@pytest.mark.parametrize("row_tokens", [4096, 120])
def test_each_prompt_as_if_alone(encoder, row_tokens):
    """In one row with others, and where a row is full."""
    prompts = ["A.", "A much longer prompt about two apples.", "And one more."]
    images = [[photos.noise(60, 40)], [], [photos.noise(40, 60, seed=1), photos.noise(30, 30)]]
    options = {"task": "edit_plus", "resize": False}
    pairs = list(zip(prompts, images, strict=True))
    samples = [prompt_sample(encoder.transform, *pair, **options) for pair in pairs]
    embeds, mask = padded(encoder.embed(samples, row_tokens=row_tokens))
    assert mask.dtype == torch.int64
    for row, (prompt, of_prompt) in enumerate(pairs):
        alone, alone_mask = encoder(prompt, of_prompt, **options)
        n = alone.shape[1]
        assert mask[row].sum() == n == alone_mask.sum()
        torch.testing.assert_close(embeds[row, :n], alone[0], rtol=0, atol=2e-5)
        assert not embeds[row, n:].any()


def test_forms_of_images(encoder):
    one, two = photos.noise(60, 40), photos.noise(40, 60, seed=1)
    options = {"task": "edit_plus", "resize": False}
    expected = encoder(["x"], [[one, two]], **options)[0]
    assert torch.equal(encoder("x", [one, two], **options)[0], expected)
    assert not torch.equal(encoder("x", [two, one], **options)[0], expected)
    each = encoder(["x", "y"], [one, None], **options)
    assert torch.equal(each[0], encoder(["x", "y"], [[one], []], **options)[0])
    assert torch.equal(encoder("x", one, task="edit")[0], encoder(["x"], [[one]], task="edit")[0])


def test_nothing_else_is_computed(encoder, monkeypatch):
    """No logits, and nothing for a gradient."""

    def project(*args):
        raise AssertionError("nobody asked for logits")

    monkeypatch.setattr(encoder.model.output.linear, "forward", project)
    with pytest.raises(AssertionError, match="nobody asked"):
        encoder.model(torch.ones(1, 2, dtype=torch.int64))
    embeds, _ = encoder("x")
    assert embeds.shape[-1] == 96
    assert not embeds.requires_grad


@pytest.mark.parametrize(
    ("prompts", "images", "options", "message"),
    [
        ("x", None, {"task": "inpaint"}, "task is one of text_to_image, edit, edit_plus"),
        ("x", [image(28, 28)], {}, "text_to_image takes no images"),
        ("x", None, {"task": "edit"}, "edit takes 1 image for each prompt, got 0"),
        ("x", [image(28, 28)] * 2, {"task": "edit"}, "edit takes 1 image for each prompt, got 2"),
        (["x", "y"], [[image(28, 28)]], {"task": "edit"}, "got 1 lists for 2 prompts"),
        ("x", ["a.png"], {"task": "edit"}, "an image is a PIL image, got str"),
        ([3], None, {}, "a prompt is a text, got int"),
        ("x", None, {"max_sequence_length": 0}, "a number of tokens from 1 on, got 0"),
        ("x", None, {"compat": "comfy"}, "compat is 'qwen' or 'diffusers', got 'comfy'"),
        ("x", [image(800, 2)], {"task": "edit", "resize": False}, "at most 200 times the other"),
    ],
)
def test_what_is_refused(encoder, prompts, images, options, message):
    with pytest.raises(ValueError, match=message):
        encoder(prompts, images, **options)


def test_no_prompts_are_no_embeddings(encoder):
    with pytest.raises(ValueError, match="at least one prompt"):
        encoder([])
