"""The folder in ComfyUI's custom_nodes by which it finds the nodes of this package."""

import shutil
from pathlib import Path

from torchtune_qwen25vl._files import replacing_folder

NAME = "torchtune_qwen25vl"
MARK = '"""Written by `python -m torchtune_qwen25vl.comfyui install`, removed by `uninstall`."""\n'
SHIM = f"""{MARK}
from torchtune_qwen25vl.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
"""
OF_COMFYUI = ("main.py", "nodes.py", "folder_paths.py")


def install(comfyui: Path) -> Path:
    """Write the folder, whole or not at all; return it.

    Raises:
        ValueError: if this is no folder of ComfyUI, or another's folder has the name.
    """
    target = _target(comfyui)
    with replacing_folder(target) as folder:
        (folder / "__init__.py").write_text(SHIM, "utf-8")
    return target


def uninstall(comfyui: Path) -> Path:
    """Remove the folder; return where it was.

    Raises:
        ValueError: likewise, or if there is none.
    """
    target = _target(comfyui)
    if not target.exists():
        raise ValueError(f"the nodes are not installed, there is no {target}")
    shutil.rmtree(target)
    return target


def _target(comfyui: Path) -> Path:
    if missing := [name for name in OF_COMFYUI if not (comfyui / name).is_file()]:
        raise ValueError(
            f"a folder of ComfyUI has {', '.join(OF_COMFYUI)}, {comfyui} lacks "
            f"{', '.join(missing)}: name the folder that its main.py is in"
        )
    target = comfyui / "custom_nodes" / NAME
    if (target.exists() or target.is_symlink()) and not _is_ours(target):
        raise ValueError(
            f"{target} was not written by this command, and is left alone: move it away first"
        )
    return target


def _is_ours(target: Path) -> bool:
    """Tell a folder that has nothing but what `install` writes (and what Python makes of it)."""
    if target.is_symlink() or not target.is_dir():
        return False
    names = {path.name for path in target.iterdir()} - {"__pycache__"}
    shim = target / "__init__.py"
    return names == {shim.name} and shim.read_text("utf-8", "replace").startswith(MARK)
