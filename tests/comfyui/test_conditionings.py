"""Conditionings in files, and what is said of them."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from torchtune_qwen25vl.comfyui import NODE_CLASS_MAPPINGS

SAVE, LOAD, INSPECT = (
    NODE_CLASS_MAPPINGS[f"Qwen25VL{name}Conditioning"] for name in ("Save", "Load", "Inspect")
)


def conditioning(length=5, *, seed=0, **values):
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, length, 8, generator=generator)
    return [[embeds, {"pooled_output": None, **values}]]


def listed():
    return LOAD.INPUT_TYPES()["required"]["file"][0]


def test_a_conditioning_comes_back(host):
    latents = [torch.randn(1, 16, 1, 4, 6), torch.randn(1, 16, 1, 2, 2).transpose(3, 4)]
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    given = conditioning(attention_mask=mask, reference_latents=latents)
    SAVE().save(given, "some/where", note="A red box.")
    assert listed() == ["some/where_00001_.safetensors [output]"]
    ((embeds, values),) = LOAD().load(listed()[0])[0]
    assert torch.equal(embeds, given[0][0])
    assert values.keys() == {"pooled_output", "attention_mask", "reference_latents"}
    assert values["pooled_output"] is None
    assert torch.equal(values["attention_mask"], mask)
    assert len(values["reference_latents"]) == 2
    assert all(map(torch.equal, values["reference_latents"], latents))


def test_many_latents_keep_their_order(host):
    """Beyond ten, where order by name would be another."""
    latents = [torch.full((1, 1), float(i)) for i in range(12)]
    SAVE().save(conditioning(reference_latents=latents), "many")
    ((_, values),) = LOAD().load(listed()[0])[0]
    assert [latent.item() for latent in values["reference_latents"]] == list(range(12))


def test_nothing_is_saved_over_another(host):
    first, second = conditioning(seed=1), conditioning(seed=2)
    SAVE().save(first, "x")
    SAVE().save(second, "x")
    assert [
        torch.equal(LOAD().load(name)[0][0][0], given[0][0])
        for name, given in zip(listed(), (first, second), strict=True)
    ] == [True, True]
    path = host.outputs / "x_00001_.safetensors"
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == {"prompt_embeds", "prompt_embeds_mask"}
        assert opened.metadata().keys() == {"torchtune_qwen25vl", "note"}
        assert opened.get_tensor("prompt_embeds_mask").tolist() == [[1] * 5]


def test_files_of_others_are_read(host):
    """In the input folder, in bf16, without a mask."""
    embeds = torch.randn(1, 4, 8, dtype=torch.bfloat16)
    save_file({"prompt_embeds": embeds}, host.inputs / "other.safetensors")
    assert listed() == ["other.safetensors"]
    ((loaded, values),) = LOAD().load("other.safetensors")[0]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, embeds.float())
    assert values == {"pooled_output": None}


def test_a_file_that_has_changed_is_read_anew(host):
    path = host.inputs / "x.safetensors"
    states = set()
    for length, time in ((4, 1), (4, 2), (5, 2)):
        save_file({"prompt_embeds": torch.zeros(1, length, 8)}, path)
        os.utime(path, ns=(time, time))
        states.add(LOAD.IS_CHANGED("x.safetensors"))
    assert len(states) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (conditioning() + conditioning(), "one conditioning, got 2"),
        (conditioning(pooled_output=torch.zeros(1, 8)), "has pooled_output"),
        (conditioning(strength=0.5, area=(1, 1)), "has area, strength"),
        ([[torch.zeros(2, 5, 8), {}]], "has a batch of 2"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(host, given, message):
    with pytest.raises(ValueError, match=message):
        SAVE().save(given, "some/where")
    assert list(host.outputs.rglob("*")) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1)}, r"has prompt_embeds \[1, tokens, width\], .* has none"),
        ({"prompt_embeds": torch.zeros(5, 8)}, r"has \[5, 8\]"),
        ({"prompt_embeds": torch.zeros(2, 5, 8)}, r"has \[2, 5, 8\]"),
        ({"prompt_embeds": torch.zeros(1, 5, 8), "x": torch.zeros(1)}, r"\(x\)"),
        (
            {"prompt_embeds": torch.zeros(1, 5, 8), "reference_latents.1": torch.zeros(1)},
            r"\(reference_latents\.1\)",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 5, 8), "prompt_embeds_mask": torch.ones(1, 4)},
            r"a mask \[1, 4\] of \[1, 5, 8\]",
        ),
    ],
)
def test_files_that_hold_no_conditioning_are_refused(host, tensors, message):
    save_file(tensors, host.inputs / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        LOAD().load("x.safetensors")


def test_a_file_that_is_cut_short_is_refused(host):
    (host.inputs / "x.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read"):
        LOAD().load("x.safetensors")


def told(*given):
    made = INSPECT().inspect(*given)
    assert made["ui"]["text"] == [made["result"][0]]
    return made["result"][0].splitlines()


def test_a_conditioning_is_described():
    embeds = torch.zeros(1, 3, 4)
    embeds[0, 0, 0], embeds[0, 1, 1], embeds[0, 2] = 3.0, 5.0, float("nan")
    values = {"attention_mask": torch.tensor([[1, 1, 0]]), "strength": 1.0, "pooled_output": None}
    latents = [torch.zeros(1, 16, 1, 8, 4)]
    assert told([[embeds, values], [embeds[:, :1], {"reference_latents": latents}]]) == [
        "1: float32 [1, 3, 4], 2 of 3 tokens count",
        "   norms of tokens: 3 to 5, mean 4",
        "   4 values are nan or infinite",
        "   also has strength",
        "2: float32 [1, 1, 4], 1 of 1 tokens count",
        "   norms of tokens: 3 to 3, mean 3",
        "   reference latents: float32 [1, 16, 1, 8, 4]",
    ]


def test_the_difference_of_two():
    """Relative to the largest value of the second."""
    embeds = torch.tensor([[[3.0, 4.0], [0.0, 8.0]]])
    other = torch.tensor([[[4.0, 3.0], [0.0, 16.0]]])
    one, two = [[embeds, {}]], [[other, {}]]
    assert told(one, two)[2:] == [
        "difference of 1: largest 8, 0.5 of the largest value; least cosine of a token 0.960000"
    ]
    assert told(one, one)[2:] == [
        "difference of 1: largest 0, 0 of the largest value; least cosine of a token 1.000000"
    ]
    assert told(one, [[other[:, :1], {}]])[2:] == [
        "difference: of shape, [[1, 2, 2]] and [[1, 1, 2]]"
    ]


def test_masks_and_latents_of_two_may_differ():
    one, masked = conditioning(), conditioning(attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    assert told(one, masked)[-1] == "   their masks differ"
    assert told(masked, masked)[-1].startswith("difference of 1: largest 0")
    first, second = (conditioning(reference_latents=[torch.full((1, 4), x)]) for x in (1.0, 2.0))
    for pair in ((one, first), (first, one), (first, second)):
        assert told(*pair)[-1] == "   their reference latents differ"
    assert told(first, first)[-1].startswith("difference of 1: largest 0")
