"""Files are found and checked by header alone."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from torchtune_qwen25vl.weights import _hub
from torchtune_qwen25vl.weights._safetensors import (
    INDEX,
    copy_settings,
    find_weights,
    open_weights,
    write_weights,
)

WEIGHTS = {name: torch.randn(4, 3) for name in ("a", "b", "c")}
SHARDS = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}


@pytest.fixture
def sharded(tmp_path):
    write_weights(tmp_path, WEIGHTS, SHARDS)
    return tmp_path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("lazily", [True, False])
def test_written_weights_are_read_back(sharded, lazily):
    files = open_weights(sharded)
    assert files.file_of == SHARDS
    assert files.shape_of == dict.fromkeys(WEIGHTS, (4, 3))
    assert files.dtypes == {torch.float32}
    read = dict(files.read(lazily=lazily))
    assert read.keys() == WEIGHTS.keys()
    assert all(torch.equal(read[name], WEIGHTS[name]) for name in WEIGHTS)


def test_what_is_read_at_once_no_longer_needs_the_file(sharded):
    files = open_weights(sharded)
    at_once, mapped = dict(files.read(lazily=False)), dict(files.read(lazily=True))
    for path in sharded.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert all(torch.equal(at_once[name], WEIGHTS[name]) for name in WEIGHTS)
    assert not any(mapped[name].any() for name in WEIGHTS)


def test_the_index_says_what_was_written(sharded):
    index = json.loads((sharded / INDEX).read_text())
    assert index == {"metadata": {"total_size": 3 * 4 * 3 * 4}, "weight_map": SHARDS}


def test_one_file_by_the_usual_name_needs_no_index(tmp_path):
    write_weights(tmp_path, WEIGHTS, dict.fromkeys(WEIGHTS, "model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert open_weights(tmp_path).shape_of.keys() == WEIGHTS.keys()


def test_several_files_need_no_index(sharded):
    (sharded / INDEX).unlink()
    assert open_weights(sharded).file_of == SHARDS
    assert open_weights(sharded, ["model-2.safetensors"]).file_of == {"c": "model-2.safetensors"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: truncate(f / "model-2.safetensors"), "model-2.safetensors is no whole safetens"),
        (lambda f: lengthen(f / "model-2.safetensors"), "model-2.safetensors is no whole safetens"),
        (
            lambda f: (f / "model-1.safetensors").write_bytes(pickle.dumps({"a": 1})),
            "model-1.safetensors is no whole safetensors file",
        ),
        (lambda f: (f / "model-1.safetensors").unlink(), "model-1.safetensors is missing"),
        (
            lambda f: rewrite_index(f, lambda m: m.update(d="model-3.safetensors")),
            "model-3.safetensors is missing",
        ),
        (lambda f: rewrite_index(f, lambda m: m.pop("b")), r"differs for 1 \(b\)"),
        (
            lambda f: rewrite_index(f, lambda m: m.update(b="model-2.safetensors")),
            r"differs for 1 \(b\)",
        ),
        (
            lambda f: rewrite_index(f, lambda m: m.update(b="../model-2.safetensors")),
            "../model-2.safetensors is none",
        ),
        (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), "is no index of weights"),
        (lambda f: (f / INDEX).write_text('{"weigh'), "is no index of weights"),
        (
            lambda f: save_file(WEIGHTS, f / "model.safetensors"),
            "holds both model.safetensors and model.safetensors.index.json",
        ),
        (
            lambda f: [(f / INDEX).unlink(), save_file(WEIGHTS, f / "model-3.safetensors")],
            "holds a in both model-1.safetensors and model-3.safetensors",
        ),
        (
            lambda f: save_file({"c": torch.ones(4, 3).to(torch.float8_e4m3fn)}, f / SHARDS["c"]),
            "holds c as F8_E4M3: quantised",
        ),
    ],
)
def test_damage_is_refused_by_name(sharded, damage, message):
    open_weights(sharded)
    damage(sharded)
    with pytest.raises(ValueError, match=message):
        open_weights(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "a.pt", "b.ckpt"])
def test_pickles_are_refused_by_name(tmp_path, name):
    torch.save(WEIGHTS, tmp_path / name)
    for files in (None, [name]):
        with pytest.raises(ValueError, match=f"safetensors files only.*holds {name}"):
            open_weights(tmp_path, files)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it holds no weights"):
        open_weights(tmp_path)


def test_sources(sharded, monkeypatch):
    asked = []
    monkeypatch.setattr(_hub, "missing_bytes", lambda *_: 0)
    monkeypatch.setattr(_hub, "_verify", lambda *_: None)
    monkeypatch.setattr(_hub, "_snapshot", lambda source, *_: asked.append(source) or sharded)
    assert find_weights(str(sharded)) == (sharded, None)
    single = sharded / "model-1.safetensors"
    assert find_weights(single) == (sharded, ["model-1.safetensors"])
    assert asked == []
    assert find_weights("Qwen/Qwen2.5-VL-3B-Instruct") == (sharded, None)
    assert asked == ["Qwen/Qwen2.5-VL-3B-Instruct"]
    no_ids = ("./Qwen/model", "Qwen", "a/b/c", "models/", "models/a b", "models/a..b")
    files = ("models/qwen.safetensors", "models/qwen.gguf")
    for wrong in (sharded / "absent", *no_ids, *files):
        with pytest.raises(ValueError, match=r"a folder, a \.safetensors file or a hub id"):
            find_weights(wrong)
    assert len(asked) == 1


def test_settings_are_copied_without_weights(sharded, tmp_path):
    for name in ("config.json", "merges.txt", "chat_template.jinja", "LICENSE"):
        (sharded / name).write_text(name)
    for name in ("adapter_config.json", "optimizer.pt", ".gitattributes"):
        (sharded / name).write_text(name)
    (sharded / "adapter").mkdir()
    (target := tmp_path / "target").mkdir()
    copy_settings(sharded, target)
    copied = {path.name: path.read_text() for path in target.iterdir()}
    names = ("config.json", "merges.txt", "chat_template.jinja", "LICENSE")
    assert copied == {name: name for name in names}


def test_settings_named_are_left_out(sharded, tmp_path):
    for name in ("config.json", "merges.txt"):
        (sharded / name).write_text(name)
    (target := tmp_path / "target").mkdir()
    copy_settings(sharded, target, but=["config.json"])
    assert [path.name for path in target.iterdir()] == ["merges.txt"]


def test_weights_are_written_however_they_lie_in_memory(tmp_path):
    weights = {"a": torch.randn(4, 3).T, "b": torch.randn(4, 6)[:, ::2]}
    write_weights(tmp_path, weights, dict.fromkeys(weights, "model.safetensors"))
    read = dict(open_weights(tmp_path).read(lazily=False))
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(read[name], weight), name
