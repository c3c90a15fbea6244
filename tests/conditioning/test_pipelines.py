"""The drop-in in diffusers' pipelines, whole: prompts and images to images."""

import copy
import sys

import accelerate
import numpy as np
import pytest
import torch

from parity import photos, reference
from parity.stages._stage import Setting
from parity.stages.conditioning import MODEL, Pair
from torchtune_qwen25vl.conditioning import DiffusersTextEncoder, PromptEncoder
from torchtune_qwen25vl.generation import Sampling

WIDTH = 96
CLOSE = 3e-6  # of images from 0 to 1: rounding of the encoder, through two steps


@pytest.fixture(scope="module")
def pair():
    return Pair(Setting())


@pytest.fixture(scope="module")
def encoder(pair):
    return DiffusersTextEncoder(pair.encoder.model)


def drawn(task, text_encoder, processor, **inputs):
    """The image that a pipeline draws in two steps, [h, w, 3] from 0 to 1."""
    pipe = reference.whole_pipeline(task, text_encoder, processor, WIDTH)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 4.0}
    seed = torch.Generator().manual_seed(3)
    return pipe(**options, **inputs, generator=seed, output_type="np").images[0]


TASKS = {
    "text_to_image": {"prompt": "A red apple.", "negative_prompt": "blurred"},
    "edit": {"prompt": "Make it blue.", "negative_prompt": " ", "image": photos.noise(64, 40)},
    "edit_plus": {
        "prompt": "Put 1 on 2.",
        "negative_prompt": " ",
        "image": [photos.noise(64, 40), photos.noise(30, 50, seed=1)],
    },
}


@pytest.fixture
def small_images(monkeypatch):
    """Let the edit pipelines bring images to the VAE at 256 * 256 pixels; 1024 * 1024 take long."""
    edit, plus = (sys.modules[reference.PIPELINES[t].__module__] for t in ("edit", "edit_plus"))
    right = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: right(area / 16, ratio))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 256 * 256)


@pytest.mark.parametrize("task", TASKS)
def test_images_are_those_of_their_encoder(task, pair, encoder, small_images):
    typed = reference.TypedTextEncoder(reference.model(MODEL))
    expected = drawn(task, typed, pair.processor, **TASKS[task])
    found = drawn(task, encoder, pair.processor, **TASKS[task])
    assert np.abs(found - expected).max() < CLOSE
    if task != "text_to_image":  # the control: positions on one axis
        other = DiffusersTextEncoder(encoder.model, compat="diffusers-1d")
        wrong = drawn(task, other, pair.processor, **TASKS[task])
        assert np.abs(wrong - expected).max() > 10 * CLOSE


def test_embeddings_made_beforehand_draw_the_same(pair, encoder):
    """The encoder can be gone by then."""
    inputs = TASKS["text_to_image"]
    expected = drawn("text_to_image", encoder, pair.processor, **inputs)
    made = PromptEncoder(encoder.model, pair.encoder.transform)
    embeds, mask = made(inputs["prompt"])
    negative, negative_mask = made(inputs["negative_prompt"])
    given = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
    given |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
    pipe = reference.whole_pipeline("text_to_image", encoder, pair.processor, WIDTH)
    alone = type(pipe)(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    alone.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(3)
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 4.0}
    found = alone(**given, **options, generator=seed, output_type="np").images[0]
    assert np.abs(found - expected).max() < CLOSE


def test_either_side_may_be_padded(pair, encoder):
    text = pair.processor.tokenizer(["One.", "Two apples and a pear."], padding=True)
    right_ids, right_mask = (torch.tensor(text[k]) for k in ("input_ids", "attention_mask"))
    pad = int((right_mask[0] == 0).sum())
    assert pad
    left_ids, left_mask = right_ids.clone(), right_mask.clone()
    left_ids[0], left_mask[0] = right_ids[0].roll(pad), right_mask[0].roll(pad)
    right = encoder(right_ids, right_mask).hidden_states[-1]
    left = encoder(left_ids, left_mask).hidden_states[-1]
    assert torch.equal(left[0, pad:], right[0, :-pad])
    assert torch.equal(left[1], right[1])
    assert not left[0, :pad].any()
    assert not right[0, -pad:].any()


def test_captions_of_layered(pair, encoder):
    """What `QwenImageLayeredPipeline.get_image_caption` asks for, token for token."""
    inputs = pair.processor(
        text="<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|><|im_end|>\n",
        images=photos.noise(84, 56),
        padding=True,
        return_tensors="pt",
    )
    theirs = reference.model(MODEL)
    right = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=151645)
    assert torch.equal(encoder.generate(**inputs, max_new_tokens=12), right)
    warm = DiffusersTextEncoder(encoder.model, sampling=Sampling(repetition_penalty=9.0))
    assert not torch.equal(warm.generate(**inputs, max_new_tokens=12), right)


@pytest.mark.parametrize("kind", reference.OTHERS, ids=lambda kind: kind.__name__)
def test_every_pipeline_takes_it(kind, pair, encoder):
    task = reference.OTHERS[kind]
    images = [photos.noise(84, 56)] if task == "edit" else []
    typed = reference.TypedTextEncoder(reference.model(MODEL))
    right, found = (
        reference.prompt_embeds(reference.made(kind, one, pair.processor), ["Two cats."], images)
        for one in (typed, encoder)
    )
    torch.testing.assert_close(found[0], right[0], rtol=0, atol=3e-5)
    assert torch.equal(found[1], right[1])


@pytest.mark.parametrize("offload", ["whole", "layer by layer"])
def test_offloading(encoder, offload):
    """What `enable_model_cpu_offload` and `enable_sequential_cpu_offload` put on a model."""
    ids = torch.tensor([[1, 2, 3]])
    right = encoder(ids).hidden_states[-1]
    moved = DiffusersTextEncoder(copy.deepcopy(encoder.model))
    if offload == "whole":
        accelerate.cpu_offload_with_hook(moved, execution_device="cpu")
    else:
        accelerate.cpu_offload(moved, execution_device=torch.device("cpu"))
        assert moved.device.type == "meta"
    assert torch.equal(moved(ids).hidden_states[-1], right)


def test_it_moves_as_a_module_does(pair, encoder):
    moved = DiffusersTextEncoder(copy.deepcopy(encoder.model))
    pipe = reference.whole_pipeline("text_to_image", moved, pair.processor, WIDTH)
    exact, _ = pipe.encode_prompt("An apple.")
    pipe.to(torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    embeds, _ = pipe.encode_prompt("An apple.")
    assert embeds.dtype == torch.bfloat16
    error = (embeds.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.02  # what bf16 rounds
    pipe.to("meta")
    assert moved.device.type == "meta"


@pytest.mark.parametrize("compat", ["diffusers", None])
def test_a_setting_that_cannot_be_is_refused(pair, compat):
    with pytest.raises(ValueError, match="compat is 'qwen' or 'diffusers-1d'"):
        DiffusersTextEncoder(pair.encoder.model, compat=compat)


def test_no_hidden_states_are_refused(encoder):
    with pytest.raises(ValueError, match="pass output_hidden_states"):
        encoder(torch.ones(1, 2, dtype=torch.int64), output_hidden_states=False)
