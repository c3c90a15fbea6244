"""Models in 4 bits: what is quantised, what it takes, and what is refused."""

from dataclasses import replace

import captions
import pytest
import tiny_folder
import torch
from torchtune.modules.common_utils import NF4Tensor

from torchtune_qwen25vl import device
from torchtune_qwen25vl.device import _machine
from torchtune_qwen25vl.device._memory import weights_bytes
from torchtune_qwen25vl.model import Int4Linear
from torchtune_qwen25vl.weights import find_adapter, load_pretrained, write_peft
from torchtune_qwen25vl.weights._pretrained import Checkpoint

PATH = "layers.1.mlp.w2"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Wide enough for blocks of NF4."""
    return captions.write_model(tmp_path_factory.mktemp("models") / "wide", nf4=True)


@pytest.fixture(scope="module")
def cpu():
    return device.look("cpu")


def test_four_bits_leave_vision_embedding_and_output_alone(whole, cpu):
    choice = device.choose(cpu, {torch.float32}, four_bit="nf4")
    model = device.load(whole, choice)
    plain = device.load(whole, device.choose(cpu, {torch.float32}))
    kinds = {name: isinstance(w, NF4Tensor) for name, w in model.named_parameters()}
    quantised = {name for name, nf4 in kinds.items() if nf4}
    assert quantised == {
        name
        for name in kinds
        if name.startswith("layers.") and name.endswith(".weight") and "norm" not in name
    }
    for name, weight in plain.named_parameters():
        ours = dict(model.named_parameters())[name]
        if name in quantised:
            assert 0 < (ours.get_original_weight() - weight).abs().max() < weight.abs().max() / 4
        else:
            assert torch.equal(ours, weight)


@pytest.fixture(scope="module")
def in_bf16(cpu):
    return replace(cpu, bf16=True)  # slower where the CPU has no instructions for it


@pytest.mark.parametrize("cpu_kernels", ["torch", "onednn"])
def test_int4_is_in_the_same_places_and_is_as_large_as_was_said(whole, in_bf16, cpu_kernels):
    wishes = {"four_bit": "int4", "dtype": "bf16", "cpu_kernels": cpu_kernels}
    choice = device.choose(in_bf16, {torch.float32}, **wishes)
    model = device.load(whole, choice)
    quantised = {name for name, m in model.named_modules() if isinstance(m, Int4Linear)}
    attn = (f"attn.{name}_proj" for name in ("q", "k", "v", "output"))
    names = [*attn, "mlp.w1", "mlp.w2", "mlp.w3"]
    assert quantised == {f"layers.{n}.{name}" for n in range(len(model.layers)) for name in names}
    if cpu_kernels == "torch":  # one that is packed does not say how large it is
        layers = map(model.get_submodule, quantised)
        held = [*model.parameters(), *(b for layer in layers for b in layer.buffers())]
        shapes = Checkpoint(whole, None, whole).files.shape_of
        said = weights_bytes(shapes, torch.bfloat16, four_bit="int4")
        assert sum(tensor.nbytes for tensor in held) == said


def test_an_adapter_is_merged_before_its_layer_is_quantised(whole, in_bf16, tmp_path):
    d_out, d_in = load_pretrained(whole)[0].get_parameter(f"{PATH}.weight").shape
    adapter = {f"{PATH}.lora_a.weight": torch.randn(4, d_in)}
    adapter[f"{PATH}.lora_b.weight"] = torch.randn(d_out, 4)
    write_peft(tmp_path, adapter, rank=4, alpha=8, base_model=str(whole))
    choice = device.choose(in_bf16, {torch.float32}, dtype="bf16", four_bit="int4")
    merged, _ = load_pretrained(whole, dtype=torch.bfloat16, adapter=find_adapter(tmp_path))
    right = Int4Linear(d_in, d_out, bias=False)
    right.fill(merged.get_submodule(PATH).weight)
    for found, same in ((find_adapter(tmp_path), True), (None, False)):
        layer = device.load(whole, choice, adapter=found).get_submodule(PATH)
        assert torch.equal(layer.scales, right.scales) == same
        assert torch.equal(layer.weight, right.weight) == same


@pytest.mark.parametrize("four_bit", ["nf4", "int4"])
def test_four_bits_run_and_captions_come_out(whole, tmp_path, four_bit, monkeypatch):
    photos = captions.write_pictures(tmp_path / "photos", 3)
    wishes = {"four_bit": four_bit, "max_new_tokens": 3}
    if four_bit == "int4":
        wishes["dtype"] = "bf16"
        monkeypatch.setattr(_machine, "_cpu_bf16", lambda: True)
    assert captions.caption(whole, photos, **wishes) in (0, 1)
    assert f'"{four_bit}"' in (photos / "_captions" / "journal-0.jsonl").read_text()
    assert captions.caption(whole, photos, max_new_tokens=3) == 2  # not to be mixed in one run


def test_layers_that_are_no_blocks_of_nf4_are_named(tmp_path, cpu):
    folder = tiny_folder.write_folder(tmp_path / "narrow", tied=True)
    with pytest.raises(ValueError, match="not whole blocks of NF4"):
        device.load(folder, device.choose(cpu, {torch.float32}, four_bit="nf4"))


def test_layers_that_are_no_tiles_of_int4_are_named(tmp_path, in_bf16):
    folder = tiny_folder.write_folder(tmp_path / "narrow", tied=True)
    choice = device.choose(in_bf16, {torch.float32}, dtype="bf16", four_bit="int4")
    with pytest.raises(ValueError, match=r"layers.0.attn.q_proj: .*got 32 and .*set four_bit=nf4"):
        device.load(folder, choice)
