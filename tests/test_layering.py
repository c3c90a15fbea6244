"""Who imports whom: read from the source, and from a fresh interpreter."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "torchtune_qwen25vl"

LEVEL_0 = {
    *("_position_ids", "_image_transform", "_tokenizer", "_positional_embeddings"),
    *(
        "_convert_weights",
        "_loss",
        "_sampling",
        "_cache",
        "_linear",
        "_weight_files",
        "_pixel_limits",
        "_files",
    ),
}
ALLOWED = {
    "_video_transform": {"_image_transform"},
    "_transform": {
        *("_image_transform", "_video_transform", "_tokenizer", "_position_ids"),
        "_pixel_limits",
    },
    "_collate": {"_loss"},
    "_generation": {"_cache", "_sampling"},
    "_encoder": {"_position_ids", "_positional_embeddings"},
}


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


def ours(path):
    """Private modules of the package's top level that a file imports."""
    prefix = "torchtune_qwen25vl._"
    return {name.split(".")[1] for name in imports(path) if name.startswith(prefix)}


@pytest.mark.parametrize("path", files("torchtune_qwen25vl"), ids=lambda p: p.name)
def test_the_package_imports_neither_parity_nor_transformers(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"parity", "recipes", "tests", "transformers"}
    assert ("torchvision" in roots) <= (path.name == "_image_transform.py")


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("_*.py")), ids=lambda p: p.name)
def test_levels(path):
    if path.stem in LEVEL_0:
        assert ours(path) == set()
    if path.stem in ALLOWED:
        assert ours(path) <= ALLOWED[path.stem]


@pytest.mark.parametrize(
    "path", [*files("parity"), *files("tests"), *files("recipes")], ids=lambda p: p.name
)
def test_only_the_reference_imports_transformers(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert ("transformers" in roots) <= (path.parent == ROOT / "parity" / "reference")


@pytest.mark.parametrize("path", files("recipes"), ids=lambda p: p.name)
def test_recipes_import_the_package_only(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"parity", "recipes", "tests"}


def test_files_stay_readable():
    for path in [*files("torchtune_qwen25vl"), *files("parity"), *files("recipes")]:
        lines = len(path.read_text().splitlines())
        assert lines <= 330, f"{path.name} has {lines} lines: more than one sitting"


def test_import_does_not_load_transformers():
    code = "import sys, torchtune_qwen25vl; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
