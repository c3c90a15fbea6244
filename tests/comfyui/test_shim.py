"""The folder by which ComfyUI finds the nodes."""

import runpy

import pytest

from torchtune_qwen25vl.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from torchtune_qwen25vl.comfyui.__main__ import WORKFLOWS, main

FILES = ("main.py", "nodes.py", "folder_paths.py")


@pytest.fixture
def comfyui(tmp_path):
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    return folder


@pytest.fixture
def shim(comfyui):
    return comfyui / "custom_nodes" / "torchtune_qwen25vl"


def test_install_and_uninstall(comfyui, shim, capsys):
    assert main(["install", str(comfyui)]) == 0
    assert str(shim) in (said := capsys.readouterr().out)
    assert str(WORKFLOWS) in said
    names = runpy.run_path(str(shim / "__init__.py"))
    assert names["NODE_CLASS_MAPPINGS"] is NODE_CLASS_MAPPINGS
    assert names["NODE_DISPLAY_NAME_MAPPINGS"] is NODE_DISPLAY_NAME_MAPPINGS
    assert main(["install", str(comfyui)]) == 0, "a second time, over what is ours"
    (shim / "__pycache__").mkdir()
    assert main(["uninstall", str(comfyui)]) == 0
    assert list(shim.parent.iterdir()) == []
    assert main(["uninstall", str(comfyui)]) == 2
    assert "the nodes are not installed" in capsys.readouterr().err


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_a_folder_that_is_no_comfyui_is_refused(comfyui, shim, capsys, command, missing):
    (comfyui / missing).unlink()
    assert main([command, str(comfyui)]) == 2
    assert f"lacks {missing}" in capsys.readouterr().err
    assert not shim.parent.exists()


@pytest.mark.parametrize("kind", ["other's file", "more files", "link", "file"])
@pytest.mark.parametrize("command", ["install", "uninstall"])
def test_what_is_not_ours_is_left_alone(comfyui, shim, tmp_path, capsys, command, kind):
    main(["install", str(comfyui)])
    if kind == "other's file":
        (shim / "__init__.py").write_text("import mine\n")
    elif kind == "more files":
        (shim / "mine.py").touch()
    else:
        moved = shim.rename(tmp_path / "moved")
        if kind == "link":
            shim.symlink_to(moved, target_is_directory=True)
        else:
            shim.touch()
    before = sorted(shim.parent.rglob("*")), shim.is_dir() and (shim / "__init__.py").read_text()
    assert main([command, str(comfyui)]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    after = sorted(shim.parent.rglob("*")), shim.is_dir() and (shim / "__init__.py").read_text()
    assert after == before
