"""Checkpoints load strictly, and give transformers' logits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity import reference
from parity.inputs import LAYOUTS, make_inputs
from torchtune_qwen25vl import hf_to_tune, shapes
from torchtune_qwen25vl.weights import _safetensors
from torchtune_qwen25vl.weights._pretrained import load_pretrained

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def logits(theirs, ours, layout="image and video"):
    inputs = make_inputs(LAYOUTS[layout], reference.IDS)
    kept = inputs.attention_mask.bool()
    with torch.no_grad():
        return (
            theirs(**reference.forward_kwargs(inputs)).logits[kept],
            ours(**inputs.ours)[kept],
        )


def assert_equal_logits(folder, ours):
    theirs, mine = logits(reference.load(str(folder), torch.float32), ours)
    torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)


def save(folder, name, **options):
    """A folder as transformers saves it, with the files of a tokenizer and a processor."""
    reference.random_model(name).save_pretrained(folder, **options)
    shutil.copyfile(Path(shapes.tiny_folder()) / "tokenizer.json", folder / "tokenizer.json")
    limits = {"min_pixels": 1568, "max_pixels": 50176}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits))
    return folder


@pytest.fixture
def tiny(tmp_path):
    return save(tmp_path / "tiny", "tiny")


@pytest.fixture
def tied(tmp_path):
    return save(tmp_path / "tied", "tied")


def change(folder, edit):
    """Edit the weights of a single-file folder."""
    weights = load_file(folder / "model.safetensors")
    weights = {name: weight.clone() for name, weight in weights.items()}
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def unread(monkeypatch):
    """Reading a single weight fails the test."""

    def read(self, *, lazily):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(_safetensors.WeightFiles, "read", read)


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiny", {}), ("tied", {}), ("tiny", {"max_shard_size": "300KB"})],
    ids=["one file", "tied", "shards"],
)
def test_a_folder_loads_with_the_logits_of_transformers(tmp_path, name, options):
    folder = save(tmp_path, name, **options)
    assert len(list(folder.glob("*.safetensors"))) == 1 or options
    model, transform = load_pretrained(folder)
    expected = hf_to_tune(reference.disk_state_dict(reference.random_model(name)))
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert not model.training
    assert transform.min_pixels == 1568
    assert transform.max_pixels == 50176
    assert transform.decode(transform.encode("a cat")) == "a cat"
    assert_equal_logits(folder, model)


def test_exchanged_projections_change_the_logits(tiny):
    def exchange(weights):
        name = "visual.blocks.0.attn.qkv.weight"
        q, k, v = weights[name].chunk(3)
        weights[name] = torch.cat([k, q, v])

    theirs = reference.load(str(tiny), torch.float32)
    change(tiny, exchange)
    expected, mine = logits(theirs, load_pretrained(tiny)[0])
    assert (mine - expected).abs().max() > 1e-3


def test_names_of_transformers_5_load_too(tiny):
    weights = reference.disk_state_dict(reference.random_model("tiny"))
    assert "model.visual.merger.ln_q.weight" in weights
    save_file(weights, tiny / "model.safetensors")
    assert_equal_logits(tiny, load_pretrained(tiny)[0])


def test_one_file_with_settings_elsewhere(tiny, tmp_path):
    single = tmp_path / "elsewhere" / "qwen.safetensors"
    single.parent.mkdir()
    (tiny / "model.safetensors").rename(single)
    with pytest.raises(ValueError, match=r"elsewhere/config\.json is missing"):
        load_pretrained(single)
    model, _ = load_pretrained(single, settings_dir=tiny)
    single.rename(tiny / "model.safetensors")
    assert_equal_logits(tiny, model)


def test_a_hub_id_is_downloaded(tiny, monkeypatch):
    monkeypatch.setattr(_safetensors, "fetch", lambda source: tiny)
    model, _ = load_pretrained("owner/name")
    assert_equal_logits(tiny, model)


def test_dtype_is_the_files_or_the_callers(tiny):
    assert {p.dtype for p in load_pretrained(tiny)[0].parameters()} == {torch.float32}
    model, _ = load_pretrained(tiny, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    change(tiny, lambda weights: weights.update({HEAD: weights[HEAD].bfloat16()}))
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float32: choose with dtype"):
        load_pretrained(tiny)
    model, _ = load_pretrained(tiny, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_every_weight_has_memory_of_its_own(tiny):
    parameters = list(load_pretrained(tiny)[0].parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(HEAD), r"1 missing \(lm_head\.weight\)"),
        (lambda w: w.pop("visual.merger.mlp.2.bias"), r"1 missing \(visual\.merger\.mlp\.2\.bias"),
        (
            lambda w: [w.pop(name) for name in list(w) if name.startswith("model.layers.2.")],
            r"12 missing \(model\.layers\.2\.",
        ),
        (lambda w: w.update(extra=torch.ones(2)), r"1 unexpected \(extra\)"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(95)}),
            r"1 of another shape \(model\.norm\.weight \[95\] instead of \[96\]\)",
        ),
        (
            lambda w: w.update({"visual.patch_embed.proj.weight": torch.ones(64, 1176)}),
            r"patch_embed\.proj\.weight \[64, 1176\] instead of \[64, 3, 2, 14, 14\]",
        ),
        (
            lambda w: w.update({HEAD: w[HEAD].to(torch.float8_e4m3fn)}),
            r"holds lm_head\.weight as F8_E4M3: quantised",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_unread(tiny, unread, edit, message):
    change(tiny, edit)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tiny)


def test_a_pickle_is_refused_before_anything_else(tiny, unread):
    torch.save(load_file(tiny / "model.safetensors"), tiny / "pytorch_model.bin")
    (tiny / "model.safetensors").unlink()
    for source in (tiny, tiny / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"safetensors files only.*pytorch_model\.bin"):
            load_pretrained(source)


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "config.json"])
def test_settings_are_needed_before_weights_are_read(tiny, unread, missing):
    (tiny / missing).unlink()
    with pytest.raises(ValueError, match=missing):
        load_pretrained(tiny)


def test_a_tied_head_may_be_saved_as_well_if_it_is_equal(tied):
    change(tied, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    model, _ = load_pretrained(tied)
    assert "output.weight" not in model.state_dict()
    assert_equal_logits(tied, model)
    change(tied, lambda weights: weights[HEAD][0].add_(1e-3))
    with pytest.raises(ValueError, match="holds both with different values"):
        load_pretrained(tied)


MEASURE = """
import re, sys
from pathlib import Path
from torchtune_qwen25vl.weights import _pretrained
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
folder, warm_up, copies = sys.argv[1:]
_pretrained.load_pretrained(warm_up)
if copies == "two":
    kept = []
    _pretrained._own = lambda weight: kept.append(weight) or weight.clone()
before = peak()
model, _ = _pretrained.load_pretrained(folder)
print(sum(parameter.nbytes for parameter in model.parameters()), peak() - before)
"""


@pytest.mark.slow
def test_loading_peaks_at_the_size_of_the_weights(tmp_path, tiny):
    folder = save(tmp_path / "wide", "wide")

    def peak(copies):
        command = [sys.executable, "-c", MEASURE, str(folder), str(tiny), copies]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size, used = map(int, done.stdout.split())
        assert size > 0.9e9
        return used / size

    assert peak("one") <= 1.1
    assert peak("two") > 1.9  # the control: a loader that keeps what it copied
