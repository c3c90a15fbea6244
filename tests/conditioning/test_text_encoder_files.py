"""Every file that people have, against the folder it was made of, or what its numbers mean."""

import gc
import json
import shutil
import weakref

import files
import pytest
import tiny_folder
import torch
from safetensors.torch import save_file
from torchtune.data import Message

from parity import photos
from torchtune_qwen25vl import generate, load_pretrained
from torchtune_qwen25vl.conditioning import (
    PromptEncoder,
    _weights,
    find_text_encoders,
    load_text_encoder,
)
from torchtune_qwen25vl.generation import inference_batch

PROMPT, PICTURE = "A red box.", photos.noise(56, 84)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.write_folder(tmp_path_factory.mktemp("tiny") / "model", tied=False)


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def weights(folder):
    return files.hub_weights(folder)


def embeds(encoder):
    text, _ = encoder(PROMPT)
    edit, _ = encoder(PROMPT, [PICTURE], task="edit_plus", resize=False)
    return torch.cat((text[0], edit[0]))


@pytest.fixture(scope="module")
def right(folder):
    return embeds(PromptEncoder(*load_pretrained(folder)))


def load(path, folder, **options):
    """A single file, with the settings that lie elsewhere."""
    options = {"config": folder, "tokenizer": folder, "dtype": torch.float32, **options}
    return load_text_encoder(path, **options)


def of(weights, folder, tmp_path):
    """What a folder with these weights embeds."""
    other = shutil.copytree(folder, tmp_path / "meant")
    save_file({k: w.contiguous() for k, w in weights.items()}, other / "model.safetensors")
    return embeds(PromptEncoder(*load_pretrained(other, dtype=torch.float32)))


def test_a_folder(folder, right):
    encoder = load_text_encoder(folder, dtype=torch.float32)
    assert torch.equal(embeds(encoder), right)
    assert load_text_encoder(folder).dtype == torch.bfloat16


def test_a_pipelines_folder(folder, right, tmp_path):
    """The layout of diffusers: also by the text encoder's own folder."""
    for name, kinds in {
        "text_encoder": ["config.json", "model.safetensors"],
        "tokenizer": ["vocab.json", "merges.txt"],
        "processor": ["preprocessor_config.json", "tokenizer.json"],
    }.items():
        (tmp_path / name).mkdir()
        for kind in kinds:
            shutil.copyfile(folder / kind, tmp_path / name / kind)
    (tmp_path / "model_index.json").write_text("{}")
    limits = json.dumps({"min_pixels": 6272, "max_pixels": 12544, "patch_size": 14})
    (tmp_path / "processor" / "preprocessor_config.json").write_text(limits)
    for place in (tmp_path, tmp_path / "text_encoder"):
        encoder = load_text_encoder(place, dtype=torch.float32)
        assert (encoder.transform.min_pixels, encoder.transform.max_pixels) == (6272, 12544)
        assert torch.equal(encoder(PROMPT)[0][0], right[: len(encoder(PROMPT)[0][0])])


@pytest.mark.parametrize("names", ["hub", "transformers 5"])
@pytest.mark.parametrize("head", [True, False])
def test_a_single_file(folder, weights, right, tmp_path, names, head):
    kept = {k: w for k, w in weights.items() if head or k != "lm_head.weight"}
    path = tmp_path / "encoder [1].safetensors"
    save_file(files.renamed(kept) if names != "hub" else kept, path)
    encoder = load(path, folder)
    assert torch.equal(embeds(encoder), right)
    batch = inference_batch([[Message("user", "Hello")]], encoder.transform)
    if head:
        assert generate(encoder.model, batch, max_new_tokens=2).tokens.shape == (1, 2)
    else:
        with pytest.raises(ValueError, match=r"has no output layer \(lm_head\)"):
            generate(encoder.model, batch, max_new_tokens=2)


def test_plain_fp8_is_cast(folder, weights, tmp_path):
    small = {k: w.to(files.FP8) if w.ndim > 1 else w for k, w in weights.items()}
    save_file(small, tmp_path / "fp8.safetensors")
    found = embeds(load(tmp_path / "fp8.safetensors", folder))
    assert torch.equal(found, of({k: w.float() for k, w in small.items()}, folder, tmp_path))


@pytest.mark.parametrize("form", ["old", "notes", "metadata"])
@pytest.mark.parametrize("keep", [False, True])
def test_scaled_fp8(folder, weights, right, tmp_path, form, keep):
    small, scales, meant = files.in_fp8(weights)
    path = files.save_scaled(tmp_path / "scaled.safetensors", small, scales, form)
    encoder = load(path, folder, keep_fp8=keep)
    found, expected = embeds(encoder), of(meant, folder, tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - right).abs().max() > 1e-3  # fp8 is not what it was made of
    kept = {b.dtype for b in encoder.model.buffers()} | {
        p.dtype for p in encoder.model.parameters()
    }
    assert (files.FP8 in kept) == keep
    if keep:
        encoder.model.to(torch.bfloat16)
        assert files.FP8 in {b.dtype for b in encoder.model.buffers()}
        rounded = embeds(encoder).float()
        assert 1e-4 < (rounded - expected).norm() / expected.norm() < 0.05


def test_scales_of_rows(folder, weights, tmp_path):
    """One for each row, those of fused q, k and v too."""
    small, scales, meant = files.in_fp8(weights)
    for name in scales:
        rows = torch.linspace(0.5, 1.5, len(small[name]))
        scales[name] = scales[name] * rows
        meant[name] = meant[name] * rows.view(-1, *[1] * (meant[name].ndim - 1))
    path = files.save_scaled(tmp_path / "rows.safetensors", small, scales, "notes")
    found, expected = embeds(load(path, folder)), of(meant, folder, tmp_path)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_weight_at_a_time(folder, weights, tmp_path, monkeypatch):
    """While a file is read, no other weight in fp8 is held beside what the model has."""
    small, scales, _ = files.in_fp8(weights)
    path = files.save_scaled(tmp_path / "scaled.safetensors", small, scales, "old")
    alive, most = weakref.WeakSet(), []

    class Counted(_weights.Scaled):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

        def plain(self, dtype):
            alive.add(self)
            most.append(len(alive))
            return super().plain(dtype)

    monkeypatch.setattr("torchtune_qwen25vl.conditioning._single.Scaled", Counted)
    monkeypatch.setattr("torchtune_qwen25vl.conditioning._load.Scaled", Counted)
    load(path, folder)
    gc.collect()
    assert len(most) > 20
    assert max(most) <= 2


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf(folder, weights, config, right, tmp_path, kind):
    meant = files.write_gguf(tmp_path / f"tiny-{kind}.gguf", weights, config, kind=kind)
    meant |= files.write_gguf(tmp_path / "tiny-mmproj.gguf", weights, config, is_vision=True)
    encoder = load_text_encoder(
        tmp_path / f"tiny-{kind}.gguf", tokenizer=folder, dtype=torch.float32
    )
    expected = of(files.weights_of(meant), folder, tmp_path)
    torch.testing.assert_close(embeds(encoder), expected, rtol=0, atol=1e-5)
    assert torch.equal(expected, right) == (kind == "F32")


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_gguf_in_blocks_of_256(tmp_path, kind):
    """The forms in which most files are published."""
    folder = tiny_folder.write_folder(tmp_path / "wide", tied=False, width=256)
    weights = files.hub_weights(folder)
    config = json.loads((folder / "config.json").read_text())
    path, tower = tmp_path / "wide.gguf", tmp_path / "mmproj.gguf"
    meant = files.write_gguf(path, weights, config, kind=kind)
    meant |= files.write_gguf(tower, weights, config, is_vision=True)
    encoder = load_text_encoder(path, tokenizer=folder, dtype=torch.float32)
    expected = of(files.weights_of(meant), folder, tmp_path)
    torch.testing.assert_close(embeds(encoder), expected, rtol=0, atol=1e-4)
    [found] = [file for file in find_text_encoders(tmp_path) if file.path == path]
    assert (found.form, found.has_output) == (f"GGUF {kind}", True)


def test_the_sizes_are_told_apart(tmp_path):
    """By headers alone: the files have no data on the disk."""
    from torchtune_qwen25vl import qwen2_5_vl_3b, qwen2_5_vl_7b, tune_to_hf

    for size, build in {"3B": qwen2_5_vl_3b, "7B": qwen2_5_vl_7b}.items():
        with torch.device("meta"):
            weights = tune_to_hf(build().state_dict())
        write_sparse(tmp_path / f"{size}.safetensors", weights)
        write_sparse(
            tmp_path / f"{size} less.safetensors",
            {k: w for k, w in weights.items() if not k.endswith("layers.20.mlp.up_proj.weight")},
        )
    found = {file.path.name: file for file in find_text_encoders(tmp_path)}
    for size in ("3B", "7B"):
        assert (found[f"{size}.safetensors"].size, found[f"{size}.safetensors"].form) == (
            size,
            "bf16",
        )
        assert not found[f"{size}.safetensors"].problem
        assert "1 missing" in found[f"{size} less.safetensors"].problem


def write_sparse(path, weights):
    header, end = {}, 0
    for name, weight in weights.items():
        size = weight.numel() * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    told = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        file.truncate(8 + len(told) + end)
