"""A stand-in of ComfyUI, and a text encoder in it."""

import sys

import pytest
import tiny_folder
import torch
from host import Host

from torchtune_qwen25vl import load_pretrained
from torchtune_qwen25vl.comfyui._host import ManagedEncoder
from torchtune_qwen25vl.conditioning import PromptEncoder

WORDS = 256  # tokens that are single bytes


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A ComfyUI that can be imported while the test runs."""
    made = Host(tmp_path / "ComfyUI")
    for name, module in made.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("model_management", "model_patcher", "utils"):
        monkeypatch.setattr(sys.modules["comfy"], name, sys.modules[f"comfy.{name}"], raising=False)
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny_folder.write_folder(tmp_path_factory.mktemp("tiny") / "model", tied=False)


@pytest.fixture(scope="session")
def plain(folder):
    """A text encoder that answers in words of its small vocabulary."""
    model, transform = load_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.output.weight[WORDS:] = 0
        model.output.weight[:WORDS] *= 3  # so that sampling finds these too
    return PromptEncoder(model, transform)


@pytest.fixture
def encoder(host, plain):
    """The same, as it passes between nodes."""
    return ManagedEncoder(plain)
