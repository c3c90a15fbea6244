"""Checks before loading, and memory that is given back."""

import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import captions
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from torchtune_qwen25vl import device, generate, padded_collate
from torchtune_qwen25vl.device import _loading, _preflight
from torchtune_qwen25vl.weights._pretrained import Checkpoint

LOAD = device.Load(text_tokens=64, min_pixels=3136)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Wide enough for blocks of NF4."""
    return captions.write_model(tmp_path_factory.mktemp("models") / "wide", nf4=True)


@pytest.fixture
def broken(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "broken"))


@pytest.fixture(scope="module")
def cpu():
    return replace(device.look("cpu"), free=8 * 10**9, total=16 * 10**9)


def test_a_whole_model_passes(whole, cpu):
    found = device.check_model(whole, cpu, LOAD)
    assert found.refuse().dtype == torch.float32
    assert "NO" not in found.table
    assert "config, tokenizer" in found.table
    assert found.max_pixels == 1280 * 784


def damage_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


def cut_in_the_middle(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def make_text_only(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["vision_config"]
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}))


def take_away_vision(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if not name.startswith("visual")}
    save_file(kept, path)


def take_away_head(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["lm_head.weight"]
    save_file(weights, path)


def lose_tokenizer(folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()


DAMAGES = {
    "weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "tokenizer": (lose_tokenizer, "vocab.json"),
    "config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "no preprocessor_config.json",
    ),
    "text-only config": (make_text_only, "vision_config"),
    "text-only weights": (take_away_vision, "visual"),
    "no head": (take_away_head, "lm_head.weight"),
    "damaged header": (damage_header, "no whole safetensors file"),
    "cut shard": (cut_in_the_middle, "no whole safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_refused_before_any_image(
    broken, damage, tmp_path, caplog, monkeypatch
):
    spoil, message = DAMAGES[damage]
    spoil(broken)
    monkeypatch.setattr("PIL.Image.open", lambda *_: pytest.fail("an image was opened"))
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    assert captions.caption(broken, folder) == 2
    assert message in caplog.text
    assert not (folder / "_captions").exists()


def test_a_model_that_is_nowhere(tmp_path, caplog):
    assert captions.caption(tmp_path / "no" / "such" / "model", tmp_path) == 2
    assert "is neither here nor such an id" in caplog.text


def test_too_little_memory_is_refused_with_a_remedy(whole, cpu):
    found = device.check_model(whole, replace(cpu, free=10**6), LOAD)
    with pytest.raises(ValueError, match="take a smaller model, set four_bit=on"):
        found.refuse()
    assert "NO  memory of CPU" in found.table


def test_coarser_numbers_are_taken_only_where_that_is_allowed(whole, cpu):
    def needs(dtype):
        choice = device.choose(replace(cpu, bf16=True), {torch.float32}, dtype=dtype)
        weights, _, batch = _preflight._needs(choice, Checkpoint(whole, None, whole), LOAD)
        return weights + batch

    for free, four_bit in ((needs("fp32") - 1, None), (needs("bf16") - 1, "nf4")):
        tight = replace(cpu, free=free, bf16=True, int4=False)
        with pytest.raises(ValueError, match="allow_downgrade=True for whatever fits"):
            device.check_model(whole, tight, LOAD).refuse()
        choice = device.check_model(whole, tight, LOAD, allow_downgrade=True).refuse()
        assert (choice.dtype, choice.four_bit) == (torch.bfloat16, four_bit)
        assert "allow_downgrade" in str(choice)
    plenty = device.check_model(whole, cpu, LOAD, allow_downgrade=True).refuse()
    assert plenty.dtype == torch.float32  # allowed is not wanted


@pytest.fixture(params=["torch", "onednn"])
def loaded(whole, cpu, request):
    choice = device.choose(cpu, {torch.float32}, cpu_kernels=request.param)
    return device.LoadedModel(whole, choice)


def test_weights_are_packed_where_that_is_chosen(loaded):
    packed = [b for b in loaded.model.buffers() if b.is_mkldnn]
    assert bool(packed) == (loaded.choice.cpu_kernels == "onednn")


def test_weights_are_read_when_they_are_needed(loaded, monkeypatch):
    load, loads = _loading.load, []
    monkeypatch.setattr(_loading, "load", lambda *a: loads.append(a) or load(*a))
    assert loaded.transform.pad_id == 151643
    assert not loads
    assert loaded.model is loaded.model
    assert len(loads) == 1


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def test_a_released_model_gives_back_its_memory(loaded):
    size = (Path(loaded.source) / "model.safetensors").stat().st_size
    empty = resident()
    held = loaded.model  # someone still holds it
    full = resident()
    assert full - empty > 0.8 * size
    loaded.release()
    assert resident() - empty < 0.2 * size
    assert loaded.model is not held  # loaded again
    assert resident() - empty < 1.2 * size
    sample = {"tokens": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}
    sample["input_pos"] = torch.arange(2)[:, None].expand(-1, 3)
    batch = padded_collate([sample], 151643, padding_side="left")
    assert generate(loaded.model, batch, max_new_tokens=2).tokens.shape == (1, 2)
