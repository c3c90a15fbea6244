"""What a GPU would be asked to do: committed ceilings, which only a change that saves may lower."""

import pytest
import torch
from torch.nn import functional as F

from parity.bench import cost, meter
from torchtune_qwen25vl.model import _attention

A_LAYER = 18  # launches of a decoder layer for a token
OUTSIDE = 24  # launches of a token outside of the layers
CEILINGS = {  # launches, and waits of the host
    "a token": (36 * A_LAYER + OUTSIDE, 0),
    "prompts": (628, 0),
    "an image": (494, 0),
    "a LoRA step": (4431, 1),
    "a full step": (4061, 2),
}


@pytest.fixture(scope="module")
def model():
    return cost.without_memory(cost.SIZES["3B"]).eval()


@pytest.fixture(scope="module")
def counted(model):
    lora = cost.without_memory(lambda: cost.LORA["3B"](**cost.ADAPTERS))
    return {
        "a token": cost.decode(model, 8),
        "prompts": cost.read(model, 8),
        "an image": cost.encode(model),
        "a LoRA step": cost.step(lora.train()),
        "a full step": cost.step(cost.without_memory(cost.SIZES["3B"]).train()),
    }


@pytest.mark.parametrize("work", CEILINGS)
def test_costs_stay_at_their_ceilings(counted, work):
    launches, waits = CEILINGS[work]
    assert counted[work].total <= launches
    assert counted[work].waits <= waits


def test_unpadded_prompts_have_no_mask(counted):
    assert counted["prompts"].masks == 0
    assert counted["a token"].masks == 8 * cost.WIDTH  # a row of columns, never their square


def test_an_image_is_copied_twice_at_most(counted):
    """Into window order as pixels, and behind the last layer back."""
    copies = ("copy_", "clone", "index", "index_select", "_to_copy")
    launches = counted["an image"].launches
    assert sum(launches[name] for name in copies) == 2
    assert launches.total() / 32 <= 24


def test_the_meter_sees_what_is_not_fused(model, monkeypatch):
    """The control: a rotation that is not compiled, and a mask made in every layer."""
    right = cost.decode(model, 1).total
    monkeypatch.setattr(meter, "PIECES", {})
    assert cost.decode(model, 1).total >= right + 36 * (2 * 4 + 1)
    monkeypatch.undo()
    monkeypatch.setattr(_attention, "prepare", lambda mask, h: mask)
    prepared = model.forward.__globals__
    monkeypatch.setitem(prepared, "prepare", lambda mask, h: mask[:, None])
    with pytest.raises(AssertionError, match="every layer would turn the mask into numbers"):
        cost.decode(model, 1)


def test_the_meter_sees_waits():
    """The control: each way in which a host asks a device."""
    number, row = torch.ones((), device="meta"), torch.ones(3, device="meta")
    with meter.metered() as counted:
        assert float(number) == 1.0
        assert bool(number)
        assert row.tolist() == [1.0, 1.0, 1.0]
        row.unique(return_inverse=True)
    assert counted.waits == 4
    with meter.metered() as counted:
        row.to("meta") + torch.ones(3).to("meta")
        torch.ones(3).tolist()
    assert (counted.waits, counted.copies) == (0, 1)
    with pytest.raises(NotImplementedError), meter.metered():
        row.nonzero()


def test_the_meter_counts_arithmetic_and_bytes():
    x, weight = (torch.empty(shape, device="meta") for shape in ((10, 6), (4, 6)))
    with meter.metered() as counted:
        F.linear(x, weight)
    assert counted.work == [("mm", 2.0 * 10 * 6 * 4, 4.0 * (60 + 24 + 40))]
    heads = torch.empty(1, 2, 8, 4, device="meta")
    with meter.metered() as counted:
        F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    assert counted.work == [("attention", 4.0 * 2 * 8 * 8 * 4 / 2, 4.0 * 4 * 64)]
