"""Files that are no text encoder, or not a whole one: each is refused by what is wrong with it."""

import json
import shutil

import files
import pytest
import tiny_folder
import torch
from hub_server import REPOSITORY, Hub, serving
from safetensors.torch import save_file

from torchtune_qwen25vl.conditioning import find_text_encoders, load_text_encoder
from torchtune_qwen25vl.weights import fetch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.write_folder(tmp_path_factory.mktemp("tiny") / "model", tied=False)


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def weights(folder):
    return files.hub_weights(folder)


def without(weights, *parts):
    return {k: w for k, w in weights.items() if not any(part in k for part in parts)}


def noted(weights, note):
    told = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    return weights | {"model.layers.0.mlp.up_proj.comfy_quant": told}


CASES = {
    "an adapter": (
        lambda w: {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)},
        r"is an adapter \(LoRA\), not a text encoder",
    ),
    "another kind of adapter": (
        lambda w: {"lora_unet_blocks_0.lokr_w1": torch.zeros(2, 2)},
        "is an adapter",
    ),
    "another model": (
        lambda w: {"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)},
        "is no Qwen2.5-VL: it has no model.embed_tokens.weight, but double_blocks.0",
    ),
    "another model with an embedding": (
        lambda w: w | {"model.layers.0.self_attn.q_norm.weight": torch.zeros(2)},
        r"holds 1 tensors that no Qwen2.5-VL has \(model.layers.0.self_attn.q_norm.weight\)",
    ),
    "no vision tower": (
        lambda w: without(w, "visual."),
        "has no vision tower, without which images cannot be edited: use a whole file",
    ),
    "half a vision tower": (lambda w: without(w, "visual.merger"), "5 missing"),
    "a layer too few": (lambda w: without(w, "layers.1.mlp.down"), "1 missing"),
    "another shape": (
        lambda w: w | {"model.norm.weight": torch.ones(31)},
        "1 of another shape",
    ),
    "fp4": (
        lambda w: noted(w, {"format": "nvfp4"}),
        "read in float8_e4m3fn or float8_e5m2, .* has 'nvfp4' for model.layers.0.mlp.up_proj:",
    ),
    "eight bits": (
        lambda w: w | {"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 32, dtype=torch.int8)},
        "has model.layers.0.mlp.up_proj.weight in I8: use another file",
    ),
    "a scale is missing": (
        lambda w: (
            w
            | {
                "scaled_fp8": torch.zeros(2).to(files.FP8),
                "model.layers.0.mlp.up_proj.weight": torch.zeros(128, 32).to(files.FP8),
            }
        ),
        r"is fp8 with scales, but 1 layers have none \(model.layers.0.mlp.up_proj.weight\)",
    ),
    "both names": (
        lambda w: w | {"model.language_model.norm.weight": torch.ones(32)},
        "a weight stands under one name",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_single_file(case, folder, weights, tmp_path):
    change, message = CASES[case]
    path = tmp_path / "a.safetensors"
    save_file(change(dict(weights)), path)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(path, config=folder, tokenizer=folder)
    [found] = find_text_encoders(tmp_path)
    if "missing" not in message and "shape" not in message:  # its size would have to be known
        assert found.problem


def test_a_number_of_scales_that_is_none(folder, weights, tmp_path):
    small, scales, _ = files.in_fp8(weights)
    path = tmp_path / "a.safetensors"
    files.save_scaled(path, small, {k: s.repeat(3) for k, s in scales.items()}, "old")
    with pytest.raises(ValueError, match="a layer has one scale, or one for each of its"):
        load_text_encoder(path, config=folder, tokenizer=folder)


def test_cut_short(folder, weights, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a.safetensors cannot be read .* fetch it again"):
        load_text_encoder(path, config=folder, tokenizer=folder)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_not_opened(folder, tmp_path, suffix):
    path = tmp_path / f"encoder{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="is pickled"):
        load_text_encoder(path, config=folder, tokenizer=folder)


def test_a_size_that_nobody_published(folder, weights, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"2048 \(3B\), 3584 \(7B\).*is 32 wide: pass config"):
        load_text_encoder(path, tokenizer=folder)
    [found] = find_text_encoders(tmp_path)
    assert (found.size, found.form, found.has_output, found.problem) == ("other", "fp32", True, "")


def test_a_config_beside_a_file_of_another_size_is_its_own(folder, weights, tmp_path):
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    assert load_text_encoder(tmp_path / "a.safetensors").model.norm.scale.shape == (32,)


def test_no_tokenizer(folder, weights, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"needs Qwen's tokenizer .* pass tokenizer"):
        load_text_encoder(path, config=folder)
    with pytest.raises(ValueError, match="there is none in"):
        load_text_encoder(path, config=folder, tokenizer=tmp_path)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    encoder = load_text_encoder(path, config=folder)
    assert (encoder.transform.min_pixels, encoder.transform.max_pixels) == (3136, 12845056)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="is neither a file nor a folder nor a hub id"):
        load_text_encoder(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="looked for in a folder"):
        find_text_encoders(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmproj": "a.gguf"}, "mmproj is for single files, a folder has its own"),
        ({"keep_fp8": True}, "keep_fp8 is for single files"),
        ({"config": "config.json"}, "config is for single files"),
    ],
)
def test_options_that_mean_nothing_to_a_folder(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_text_encoder(folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mmproj": "a.gguf"}, "mmproj belongs to a .gguf file"),
        ({"keep_fp8": True}, "keep_fp8 is for weights in fp8, .* is fp32"),
    ],
)
def test_options_that_mean_nothing_to_a_file(folder, weights, tmp_path, options, message):
    path = tmp_path / "a.safetensors"
    save_file(weights, path)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(path, config=folder, tokenizer=folder, **options)


def test_a_tied_output_layer_must_be_the_embedding(tmp_path):
    """Some tools save both; then they are one."""
    folder = tiny_folder.write_folder(tmp_path / "tied", tied=True)
    weights = files.hub_weights(folder)
    path, embedding = tmp_path / "a.safetensors", weights["model.embed_tokens.weight"]
    options = {"config": folder, "tokenizer": folder, "dtype": torch.float32}
    save_file(weights | {"lm_head.weight": embedding.clone()}, path)
    model = load_text_encoder(path, **options).model
    assert torch.equal(model.tok_embeddings.weight, embedding)
    save_file(weights | {"lm_head.weight": embedding + 1}, path)
    with pytest.raises(ValueError, match="holds both with different values"):
        load_text_encoder(path, **options)


def gguf(tmp_path, weights, config, name="tiny-F32.gguf", **options):
    files.write_gguf(tmp_path / name, weights, config, **options)
    return tmp_path / name


def test_gguf_without_its_vision_tower(folder, weights, config, tmp_path):
    path = gguf(tmp_path, weights, config)
    with pytest.raises(ValueError, match=r"has no vision tower, .*: name its mmproj file"):
        load_text_encoder(path, tokenizer=folder)
    assert "mmproj" in find_text_encoders(tmp_path)[0].problem


def test_gguf_with_several_vision_towers(folder, weights, config, tmp_path):
    path = gguf(tmp_path, weights, config)
    for name in ("mmproj-a.gguf", "mmproj-b.gguf"):
        gguf(tmp_path, weights, config, name, is_vision=True)
    with pytest.raises(ValueError, match=r"several vision towers .*choose by mmproj"):
        load_text_encoder(path, tokenizer=folder)
    load_text_encoder(path, tokenizer=folder, mmproj=tmp_path / "mmproj-b.gguf")
    gguf(tmp_path, weights, config, "tiny-mmproj.gguf", is_vision=True)
    load_text_encoder(path, tokenizer=folder)


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (["v.patch_embd.weight.1"], "lacks v.patch_embd.weight.1, half of the patch embedding"),
        (["v.post_ln.weight"], "1 missing .*vision.merger.norm.scale"),
        (["v.blk.1.attn_k.bias"], "1 missing .*vision.layers.1.attn.k_proj.bias"),
    ],
)
def test_gguf_lacks_a_tensor(folder, weights, config, tmp_path, left_out, message):
    path = gguf(tmp_path, weights, config)
    gguf(tmp_path, weights, config, "mmproj.gguf", is_vision=True, left_out=left_out)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(path, tokenizer=folder)


def test_gguf_of_something_else(folder, weights, config, tmp_path):
    path = gguf(tmp_path, weights, config)
    with pytest.raises(ValueError, match=r"the vision tower \(mmproj\) is of the archi"):
        load_text_encoder(path, tokenizer=folder, mmproj=path)
    tower = gguf(tmp_path, weights, config, "mmproj.gguf", is_vision=True)
    with pytest.raises(ValueError, match="the text encoder is of the architecture qwen2vl"):
        load_text_encoder(tower, tokenizer=folder)
    path.write_bytes(b"GGUF" + bytes(7))
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        load_text_encoder(path, tokenizer=folder)


def test_a_pipeline_of_the_hub_is_fetched_without_its_transformer(tmp_path):
    content = dict.fromkeys(
        ["config.json", "transformer/a.safetensors", "vae/b.safetensors", "text_encoder/c.json"],
        b"{}",
    )
    with serving(Hub(content)) as hub:
        folder = fetch(
            REPOSITORY,
            cache_dir=tmp_path,
            endpoint=hub.endpoint,
            waits=(),
            compare=False,
        )
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == [
        "config.json",
        "text_encoder/c.json",
    ]
