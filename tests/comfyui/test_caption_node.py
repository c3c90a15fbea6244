"""The node that describes images, against generation itself."""

import numpy as np
import pytest
import torch
from host import Cancelled
from torchtune.data import Message

from parity import photos
from torchtune_qwen25vl import generate
from torchtune_qwen25vl.captioning import PRESETS
from torchtune_qwen25vl.comfyui import NODE_CLASS_MAPPINGS
from torchtune_qwen25vl.generation import inference_batch
from torchtune_qwen25vl.jobs import read_pixels, seeded

FIRST, SECOND = photos.noise(56, 84, seed=1), photos.noise(56, 84, seed=2)
DRAWN = {"temperature": 0.7, "top_p": 0.9}  # by the preset "creative"


def caption(encoder, *images, **changes):
    """Captions of images, with few tokens and pixels where nothing else is said."""
    asked = {
        "preset": "standard",
        "prompt": "",
        "sampling": "preset",
        "temperature": 0.3,
        "max_new_tokens": 5,
        "max_pixels": 1280 * 784,
        "seed": 0,
    }
    batch = torch.from_numpy(np.stack(images)).float() / 255
    node = NODE_CLASS_MAPPINGS["Qwen25VLCaption"]()
    return node.caption(encoder, batch, **(asked | changes))[0]


def expected(plain, image, question, max_pixels=1280 * 784, **options):
    pixels = read_pixels(image, 3136, max_pixels)
    content = [
        {"type": "image", "content": torch.from_numpy(pixels).movedim(-1, 0), "resized": True},
        {"type": "text", "content": question},
    ]
    batch = inference_batch([[Message("user", content)]], plain.transform)
    stops = plain.transform.stop_tokens
    made = generate(plain.model, batch, stop_tokens=stops, **{"max_new_tokens": 5} | options)
    tokens = made.tokens[0, : made.lengths[0]].tolist()
    return plain.transform.decode([t for t in tokens if t not in stops]).strip()


def test_each_image_has_the_caption_that_it_gets_alone(host, encoder, plain):
    question = PRESETS["standard"].prompt
    right = [expected(plain, image, question) for image in (FIRST, SECOND)]
    assert right[0] != right[1]
    assert caption(encoder, FIRST, SECOND) == right
    assert host.loaded == [plain.model]
    total, values = host.bars[0]
    assert total == 10
    assert values == sorted(values)
    assert values[-1] == 10


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"preset": "creative", "max_new_tokens": 40}, DRAWN | {"max_new_tokens": 40}),
        ({"preset": "creative", "sampling": "greedy"}, {"top_p": 0.9}),
        ({"sampling": "temperature", "seed": 3}, {"temperature": 0.3}),
        ({"max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"max_new_tokens": 0}, {"max_new_tokens": 128}),
        ({"max_pixels": 4 * 784}, {"max_pixels": 4 * 784}),
    ],
    ids=str,
)
def test_a_caption_is_chosen_as_the_node_says(host, encoder, plain, changes, options):
    question = PRESETS[changes.get("preset", "standard")].prompt
    generator = seeded(changes.get("seed", 0), "0", torch.device("cpu"))
    right = expected(plain, FIRST, question, generator=generator, **options)
    assert caption(encoder, FIRST, **changes) == [right]


def test_a_question_of_the_user_stands_for_the_presets(host, encoder, plain):
    """As it is: braces are no variables here, there being no file with a name."""
    question = "What is {name}?"
    assert caption(encoder, FIRST, prompt=f" {question}\n") == [expected(plain, FIRST, question)]


def test_a_caption_can_be_cancelled(host, encoder):
    host.cancel_at = 3
    with pytest.raises(Cancelled):
        caption(encoder, FIRST, SECOND)
    assert host.bars == [(10, [0, 1, 2, 3])]


def test_the_token_that_ends_a_caption_is_no_part_of_it(host, encoder, plain, monkeypatch):
    """Be it any letter that the caption has, here its last one."""
    question = PRESETS["standard"].prompt
    whole = expected(plain, FIRST, question)
    ends = plain.transform.encode(whole[-1])[0]
    monkeypatch.setattr(plain.transform, "stop_tokens", [ends])
    (said,) = caption(encoder, FIRST)
    assert said == expected(plain, FIRST, question) == whole[: whole.index(whole[-1])]
