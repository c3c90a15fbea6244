"""Parts, each trained in its own way."""

import itertools

import pytest
import tiny
import torch
from training_samples import Transform, sample

from torchtune_qwen25vl.training import (
    GradientCheck,
    Part,
    StepCollate,
    parameter_groups,
    read_parts,
    train_step,
    trained_names,
    tuning,
)

ADAPTERS = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4}


def parts(vision="frozen", merger="full", decoder="full"):
    ways = {"vision": vision, "merger": merger, "decoder": decoder}
    return {n: Part(way, lr=None if way == "frozen" else 1e-3) for n, way in ways.items()}


def model(how):
    adapters = ADAPTERS if any("ora" in part.train for part in how.values()) else {}
    return tiny.model(**tuning(how, adapters)).train()


def batches(*kinds):
    return StepCollate(Transform.pad_id, batch_size=9, pack_to=None)(
        [sample(kind, seed) for seed, kind in enumerate(kinds)]
    ).batches


def step(built, how, *kinds, check=None):
    optimizer = torch.optim.AdamW(parameter_groups(built, how))
    return train_step(built, optimizer, batches(*kinds), check=check or GradientCheck(how))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"train": "half", "lr": 1.0}, "parts.vision: train must be one of"),
        ({"train": "full"}, "needs an lr"),
        ({"train": "frozen", "lr": 1e-3}, "a frozen part takes no lr"),
        ({"train": "frozen", "weight_decay": 0.1}, "a frozen part takes no lr"),
        (
            {"train": "full", "lr": 1e-3, "rate": 1},
            r"parts.vision has no keys \['rate'\]; it takes",
        ),
    ],
)
def test_wrong_options_are_refused_by_the_name_of_the_part(section, said):
    full = {"train": "full", "lr": 1e-3}
    with pytest.raises(ValueError, match=said):
        read_parts({"vision": section, "merger": full, "decoder": full})


def test_every_part_is_named():
    with pytest.raises(ValueError, match="parts must be"):
        read_parts({"vision": {"train": "frozen"}})


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (parts(vision="lora", decoder="dora"), "LoRA everywhere or DoRA everywhere"),
        (parts(vision="qlora"), "only the decoder is held in NF4: vision takes 'lora'"),
        (parts(), "none is"),
    ],
)
def test_parts_that_cannot_be_combined_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        tuning(how, ADAPTERS)


@pytest.mark.parametrize(
    ("vision", "decoder"),
    [
        *itertools.product(["frozen", "full", "lora"], repeat=2),
        *itertools.product(["frozen", "full", "dora"], repeat=2),
    ],
)
def test_each_part_moves_if_and_only_if_it_is_trained(vision, decoder):
    how = parts(vision=vision, decoder=decoder)
    built = model(how)
    before = {name: weight.clone() for name, weight in built.state_dict().items()}
    step(built, how, "image", "text")
    moved = {name for name, weight in built.state_dict().items() if (weight != before[name]).any()}
    assert moved <= set(trained_names(built))
    for part, prefix in {"vision": "vision.layers", "decoder": "layers"}.items():
        weights = [name for name in moved if name.startswith(prefix)]
        assert bool(weights) == (how[part].train != "frozen")
        if how[part].train in ("lora", "dora"):
            assert all("lora" in name or "magnitude" in name for name in weights)
    assert any(name.startswith("vision.merger") for name in moved)


def test_qlora_holds_the_decoder_in_nf4_and_trains_it():
    how = parts(decoder="qlora")
    sizes = {"embed_dim": 256, "intermediate_dim": 256, "num_heads": 4, "num_kv_heads": 4}
    built = tiny.model(**tuning(how, ADAPTERS), **sizes, mrope_section=(8, 12, 12)).train()
    q_proj = built.layers[0].attn.q_proj
    assert type(q_proj.weight.data).__name__ == "NF4Tensor"
    before = q_proj.lora_b.weight.clone()
    step(built, how, "image")
    assert (q_proj.lora_b.weight != before).any()


def test_parts_have_their_own_rate_and_decay():
    how = {
        "vision": Part("frozen"),
        "merger": Part("full", lr=1e-2, weight_decay=0.5),
        "decoder": Part("lora", lr=1e-4),
    }
    groups = parameter_groups(model(how), how)
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    assert found == [("merger", 1e-2, 0.5), ("decoder", 1e-4, 0.0)]
    assert all(group["params"] for group in groups)


def test_a_trained_part_without_gradient_stops_the_run(monkeypatch):
    how = parts(vision="lora")
    built = model(how)
    encode = built.vision.forward
    monkeypatch.setattr(built.vision, "forward", lambda *a, **k: encode(*a, **k).detach())
    with pytest.raises(ValueError, match=r"the merger is trained \(full\).*norm is 0.0"):
        step(built, how, "image")


def test_a_gradient_that_is_not_finite_stops_the_run():
    how = parts()
    built = model(how)
    with torch.no_grad():
        built.norm.scale[0] = torch.nan
    before = built.layers[0].attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match=r"the decoder is trained \(full\).*norm is nan"):
        step(built, how, "image")
    assert torch.equal(built.layers[0].attn.q_proj.weight, before)


def test_a_frozen_part_with_gradients_stops_the_run():
    how = parts()
    built = model(how)
    built.vision.layers[0].attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="the vision is frozen, yet it has gradients"):
        step(built, how, "image")


def test_parts_that_see_media_wait_for_a_step_with_media():
    how = parts(vision="full")
    built, check = model(how), GradientCheck(how)
    step(built, how, "text", check=check)
    assert check.pending == {"vision", "merger"}
    step(built, how, "image", "text", check=check)
    assert not check.pending
