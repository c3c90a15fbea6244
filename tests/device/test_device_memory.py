"""The memory formula: against numbers worked out by hand, and against what a forward took."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from parity.inputs import make_inputs
from torchtune_qwen25vl import generate, qwen2_5_vl_3b
from torchtune_qwen25vl.device._memory import Footprint, weights_bytes
from torchtune_qwen25vl.generation import Prompt, RunningBatch, Sampling

# so wide that layers outweigh what is computed once
WIDE = {
    "embed_dim": 512,
    "intermediate_dim": 1024,
    "num_layers": 3,
    "vision_embed_dim": 256,
    "vision_intermediate_dim": 512,
    "mrope_section": (16, 24, 24),
    "vocab_size": 2048,
}
LAYOUTS = {"text": [600], "an image": [4, (1, 40, 40), 4], "both": [128, (1, 32, 32), 128]}


def test_the_formula_by_hand():
    with torch.device("meta"):
        model = qwen2_5_vl_3b()
    footprint = Footprint.of(model, torch.bfloat16)
    cache = 36 * 2 * 2 * 128 * 2  # layers, keys and values, their heads, numbers of one, bytes
    assert cache == 36_864
    layer = (6 * 2048 + 3 * 11_008) * 2 + 2 * 2048 * 4
    assert footprint.token == cache + layer == 143_872
    patch = 3 * 2 * 14 * 14 * (4 + 2)  # in fp32 and as computed
    vision_layer = (6 * 1280 + 3 * 3420) * 2 + 2 * 1280 * 4
    assert footprint.image_token == 4 * (patch + vision_layer) == 212_704
    assert footprint.logits == 4 * 4 * 151_936 == 2_430_976
    row = 150 * 143_872 + 100 * 212_704 + 2_430_976 + 150 * 150 * (1 + 2)
    assert footprint.batch(2, 100, 50) == 2 * row == 90_699_352
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert weights_bytes(shapes, torch.bfloat16) == 2 * 3_754_622_976


def peak_of(model, run):
    """Return the most bytes that were held beside the weights."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        run(tracker)
    total = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return total - sum(p.nbytes for p in model.parameters())


def peak(model, inputs):
    """Return the most bytes that were held beside the weights while a prompt was read."""
    batch = {"tokens": inputs.tokens, "input_pos": inputs.positions}
    held = 0
    if len(inputs.grid_thw):
        vision = {"pixel_values": inputs.pixel_values, "grid_thw": inputs.grid_thw}
        batch["encoder_input"], held = {"vision": vision}, inputs.pixel_values.nbytes
    return peak_of(model, lambda _: generate(model, batch, max_new_tokens=1)) + held


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula_bounds_what_is_measured(layout):
    """It is more than a forward takes, and less than twice as much."""
    model = tiny.model(**WIDE)
    inputs = make_inputs([LAYOUTS[layout]], tiny.IDS, seed=0)
    measured = peak(model, inputs)
    images = int(inputs.grid_thw.prod(-1).sum()) // 4 if len(inputs.grid_thw) else 0
    footprint, text = Footprint.of(model, torch.float32), inputs.tokens.shape[1] - images
    assert measured <= footprint.batch(1, images, text) <= 2 * measured
    part = (
        replace(footprint, image_token=0) if layout == "an image" else replace(footprint, token=0)
    )
    if layout != "both":
        assert part.batch(1, images, text) < measured, "half of the formula would pass"


def test_rows_that_come_and_go_take_no_more_than_a_batch():
    """Two rows in flight, and two that enter when the memory of four has to be found anew."""
    model, new_tokens = tiny.model(**WIDE), 64
    inputs = make_inputs([[100, (1, 32, 32), 100]], tiny.IDS, seed=0)
    sample = {**inputs.ours, "tokens": inputs.tokens[0], "input_pos": inputs.positions[0]}

    def run(tracker):
        batch = RunningBatch(model, 1007, Sampling(), max_new_tokens=new_tokens)
        for rows in (2, 2):
            tracker.reset_mod_stats()
            batch.enter([Prompt(None, sample)] * rows)

    images = 32 * 32 // 4
    text = inputs.tokens.shape[1] - images + new_tokens
    footprint = Footprint.of(model, torch.float32)
    measured = peak_of(model, run) + 2 * inputs.pixel_values.nbytes
    assert footprint.batch(1, images, text) < measured <= footprint.batch(4, images, text)
