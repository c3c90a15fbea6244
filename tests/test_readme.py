"""What the README says runs."""

import pathlib
import re
import shlex
import shutil
import sys

import pytest
import torch
from PIL import Image

from torchtune_qwen25vl import _cli, qwen2_5_vl_from_config, tune_to_hf
from torchtune_qwen25vl._weight_files import write_weights
from torchtune_qwen25vl.shapes import draw, random_scene, tiny_folder

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of the example's shape with random weights."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder(), folder)
    weights = tune_to_hf(qwen2_5_vl_from_config(folder).state_dict())
    weights = {name: weight.detach() for name, weight in weights.items()}
    write_weights(folder, weights, dict.fromkeys(weights, "model.safetensors"))
    return folder


def test_python_blocks_run(folder, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    draw(random_scene(0)).save(photo)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"folder": folder, "photo": photo})
    assert capsys.readouterr().out
    assert Image.open(photo)


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_there_are_exactly_two_commands_to_set_up():
    setup = [command for command in commands() if command[:3] == ["python3", "-m", "pip"]]
    assert [command[-1] for command in setup] == ["parity", "pytest"]


def test_lists_and_copies_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if command[:3] in (["uv", "run", "tune-qwen25vl"],) and command[3] in ("ls", "cp"):
            monkeypatch.setattr(sys, "argv", command[2:])
            _cli.main()
    assert "finetune" in capsys.readouterr().out
    assert (tmp_path / "my.yaml").exists()


def test_every_name_in_the_tree_exists():
    tree = blocks("")[-1]
    for name in re.findall(r"^\s*([\w/]+)/ ", tree, re.MULTILINE):
        assert (ROOT / name).is_dir() or (ROOT / "torchtune_qwen25vl" / name).is_dir(), name
