"""Who imports whom: read from the source, and from a fresh interpreter."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "torchtune_qwen25vl"

LEVELS = (  # a file imports what lies on levels below its own, and what lies in its own room
    {"_lock"},
    {"_ahead", "_files", "_ranks", "_rounding", "_torchtune", "_position_ids", "media"},
    {"_plots", "transform", "model"},
    {"generation", "weights"},
    {"data", "device"},
    {"jobs", "training"},
    {"captioning", "hidden_states", "conditioning", "evaluation", "shapes"},
    {"comfyui", "_cli"},
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path):
    """Module names that a file imports, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def room_of(path):
    """The room of a file of the package; of a file of its root, the file's own name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def ours(path):
    """Modules of the package that a file imports, each as the parts of its name after ours."""
    for name in imports(path):
        root, *parts = name.split(".")
        if root == "torchtune_qwen25vl" and parts:
            yield parts


IN_ROOMS = [path for path in files("torchtune_qwen25vl") if room_of(path) != "__init__"]


@pytest.mark.parametrize("path", IN_ROOMS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_and_to_faces(path):
    room = room_of(path)
    for other, *inside in ours(path):
        if other == room:
            continue
        assert LEVEL_OF[other] < LEVEL_OF[room], (
            f"{room} (level {LEVEL_OF[room]}) imports {other} (level {LEVEL_OF[other]})"
        )
        private = [part for part in inside if part.startswith("_")]
        assert not private, f"{path.name} looks into {other}: {'.'.join(inside)}"


def test_every_room_has_a_level():
    rooms = {room_of(path) for path in IN_ROOMS}
    assert rooms <= set(LEVEL_OF), f"without a level: {rooms - set(LEVEL_OF)}"


@pytest.mark.parametrize("path", files("torchtune_qwen25vl"), ids=lambda p: p.name)
def test_the_package_imports_neither_parity_nor_transformers(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"parity", "recipes", "tests", "transformers", "diffusers", "peft", "trl"}
    assert ("torchvision" in roots) <= (room_of(path) == "transform")


@pytest.mark.parametrize(
    "path", [*files("parity"), *files("tests"), *files("recipes")], ids=lambda p: p.name
)
def test_only_the_reference_imports_transformers(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert ("transformers" in roots) <= (path.parent == ROOT / "parity" / "reference")


@pytest.mark.parametrize("path", files("recipes"), ids=lambda p: p.name)
def test_recipes_import_faces_only(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"parity", "recipes", "tests"}
    for parts in ours(path):
        assert not any(part.startswith("_") for part in parts), ".".join(parts)


def test_files_stay_readable():
    for path in [*files("torchtune_qwen25vl"), *files("parity"), *files("recipes")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 300, f"{path.name} has {lines} lines: more than one sitting"


def test_import_loads_neither_transformers_nor_comfyui():
    code = (
        "import sys, torchtune_qwen25vl; assert 'transformers' not in sys.modules\n"
        "import torchtune_qwen25vl.comfyui\n"
        "assert not {'comfy', 'folder_paths', 'comfy_extras'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
