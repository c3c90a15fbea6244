"""Prompts are padded on the left."""

import pytest
import tiny
import torch

from parity.inputs import make_inputs
from torchtune_qwen25vl.generation import generate


@pytest.mark.parametrize("padding", [1, 2, 5])
def test_padding_on_the_right_is_refused_however_short(padding):
    inputs = make_inputs([[7 + padding], [7]], tiny.IDS, seed=0)
    mask = torch.ones(2, 7 + padding, 7 + padding).tril().bool()
    with pytest.raises(ValueError, match=r"padded on the left .* but rows \[1\] are not"):
        generate(tiny.model(), {**inputs.ours, "mask": mask}, max_new_tokens=1)
    generate(tiny.model(), inputs.padded_left().ours, max_new_tokens=1)
