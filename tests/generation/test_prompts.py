"""Prompts as they are read: each row with the images that are its own, and padded on the left."""

import itertools

import pytest
import tiny
import torch

from parity.inputs import make_inputs
from torchtune_qwen25vl.generation import _generate, generate

UNIT = (1, 2, 2)  # an image of one placeholder
ROWS = {
    "one": [4, UNIT, 3],
    "two": [2, UNIT, 1, UNIT, 2],
    "text": [9],
    "larger": [3, (1, 4, 6), 2],
}


@pytest.mark.parametrize("order", list(itertools.permutations(ROWS)))
def test_each_row_is_read_with_its_own_images(order, monkeypatch):
    """Else placeholders and embeddings differ in number, or an image is another row's."""
    batch = make_inputs([ROWS[name] for name in order], tiny.IDS, seed=0).padded_left().ours
    model = tiny.model()
    at_once = generate(model, batch, max_new_tokens=1).tokens
    monkeypatch.setattr(_generate, "PREFILL_TOKENS", 1)
    seen = []

    def count(module, args, kwargs, output):
        seen.append(len(kwargs["grid_thw"]))

    model.vision.register_forward_hook(count, with_kwargs=True)
    assert torch.equal(generate(model, batch, max_new_tokens=1).tokens, at_once)
    images = [sum(isinstance(part, tuple) for part in ROWS[name]) for name in order]
    assert seen == [count for count in images if count]


@pytest.mark.parametrize("padding", [1, 2, 5])
def test_padding_on_the_right_is_refused_however_short(padding):
    inputs = make_inputs([[7 + padding], [7]], tiny.IDS, seed=0)
    mask = torch.ones(2, 7 + padding, 7 + padding).tril().bool()
    with pytest.raises(ValueError, match=r"padded on the left .* but rows \[1\] are not"):
        generate(tiny.model(), {**inputs.ours, "mask": mask}, max_new_tokens=1)
    generate(tiny.model(), inputs.padded_left().ours, max_new_tokens=1)
