"""An adapter in PEFT's form, merged into its base as the base is read."""

import json

import pytest
import tiny_folder
import torch
from safetensors.torch import load_file
from torchtune.modules.peft import get_merged_lora_ckpt

from torchtune_qwen25vl import hf_to_tune, load_pretrained
from torchtune_qwen25vl.weights import Adapter, find_adapter, write_peft

RANK, ALPHA = 4, 6
DECODER = ["layers.0.attn.q_proj", "layers.1.mlp.w2"]
VISION = [f"vision.layers.1.attn.{letter}_proj" for letter in "qkv"] + ["vision.layers.0.mlp.w1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder.write_folder(tmp_path_factory.mktemp("m") / "tied", tied=True)


def write(folder, base, modules, *, dora=False, full=()):
    """An adapter of these layers; its weights, and those of the base, in tune layout."""
    state = hf_to_tune(load_file(base / "model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    adapter = {name: state[name] + 0.1 for name in full}
    for module in modules:
        d_out, d_in = state[f"{module}.weight"].shape
        adapter[f"{module}.lora_a.weight"] = torch.randn(RANK, d_in, generator=generator)
        adapter[f"{module}.lora_b.weight"] = torch.randn(d_out, RANK, generator=generator)
        if dora:
            adapter[f"{module}.magnitude"] = torch.rand(d_out, generator=generator)
    folder.mkdir()
    held = dict(adapter)
    if "tok_embeddings.weight" in full:  # as save_adapter writes a tied output
        held["output.weight"] = held["tok_embeddings.weight"].clone()
    write_peft(folder, held, rank=RANK, alpha=ALPHA, base_model=str(base))
    return state, adapter


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(
    "full", [(), ("vision.merger.w1.weight", "norm.scale", "tok_embeddings.weight")]
)
def test_it_is_merged_as_a_training_merges_it(base, tmp_path, dora, full):
    state, adapter = write(tmp_path / "a", base, DECODER + VISION, dora=dora, full=full)
    lora = {name: weight for name, weight in adapter.items() if name not in full}
    own = {name: adapter.get(name, weight).clone() for name, weight in state.items()}
    expected = get_merged_lora_ckpt(own | lora, RANK, ALPHA)
    model, _ = load_pretrained(base, adapter=find_adapter(tmp_path / "a"))
    found = model.state_dict()
    changed = 0
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-6, msg=name)
        changed += not torch.equal(weight, state[name])
    assert changed == len(DECODER + VISION) + len(full)


def test_its_dtype_counts_among_those_of_the_files(base, tmp_path):
    write(tmp_path / "a", base, DECODER)
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert Adapter(tmp_path / "a").dtypes == {next(iter(weights.values())).dtype}


def test_a_folder_of_a_model_is_no_adapter(base, tmp_path):
    assert find_adapter(base) is None
    assert find_adapter("owner/name") is None
    write(tmp_path / "a", base, DECODER)
    assert find_adapter(tmp_path / "a" / "adapter_model.safetensors").base == str(base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_rslora": True}, "says use_rslora = True"),
        ({"peft_type": "IA3"}, "says peft_type = 'IA3'"),
        ({"bias": "all"}, "says bias = 'all'"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ],
)
def test_what_is_not_computed_is_refused(base, tmp_path, change, said):
    write(tmp_path / "a", base, DECODER)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        Adapter(tmp_path / "a")


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    wider = tiny_folder.write_folder(tmp_path / "wider", tied=True, width=64)
    write(tmp_path / "a", wider, DECODER)
    with pytest.raises(ValueError, match=r"no place for 2 of its weights \(model.layers.0.self"):
        load_pretrained(base, adapter=Adapter(tmp_path / "a"))


def test_a_scale_of_its_own_counts(base, tmp_path):
    write(tmp_path / "a", base, DECODER)
    plain, _ = load_pretrained(base, adapter=Adapter(tmp_path / "a"))
    path = tmp_path / "a" / "adapter_config.json"
    pattern = {"alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2 * ALPHA}}
    path.write_text(json.dumps(json.loads(path.read_text()) | pattern))
    other, _ = load_pretrained(base, adapter=Adapter(tmp_path / "a"))
    zero, _ = load_pretrained(base)
    for name, factor in (("layers.0.attn.q_proj.weight", 2), ("layers.1.mlp.w2.weight", 1)):
        moved, expected = other.state_dict()[name], plain.state_dict()[name]
        start = zero.state_dict()[name]
        torch.testing.assert_close(moved - start, factor * (expected - start), atol=1e-4, rtol=1e-4)
