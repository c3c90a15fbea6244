"""Every import is declared: in the core, or in the extra that a room says it needs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
ALL_EXTRAS = [requirement for extra in EXTRAS.values() for requirement in extra]
DEV = PROJECT["dependency-groups"]["dev"]
INSTALLED = packages_distributions()  # it reads the list of every file of every distribution
EXTRA_OF = {  # by the room, or file of the root, that imports it where it is used
    "_plots": "plots",
    "media": "video",  # and by name heic and jxl, which stand in BY_NAME
    "model": "cuda",
    "hidden_states": "states",
    "conditioning": "gguf",
    "image": "image",  # the recipe
}
HOSTS = {  # what a room runs inside, imported where it is used
    "comfyui": {"comfy", "folder-paths"},
    "evaluation": {"lmms-eval"},
}
RUN_BY_VLLM = [ROOT / "parity" / "serve" / name for name in ("_captions.py", "_vllm.py")]
OURS = {"torchtune_qwen25vl", "parity", "tests"}
BY_NAME = {"pillow-heif", "pillow-jxl-plugin"}  # Pillow's plugins, imported where installed
FOR_OTHERS = {"torchao"}  # imported by torchtune, which does not declare it


def names(requirements):
    """Names of distributions, as they are compared."""
    return {_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path, *, when_used=True):
    """Distributions that a file imports when it is loaded, and with `when_used` later too."""
    found = set()
    stack = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            stack += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif when_used or not isinstance(node, ast.FunctionDef):
            stack += ast.iter_child_nodes(node)
    found -= {*OURS, *sys.stdlib_module_names}
    return {_normal(INSTALLED.get(name, [name])[0]) for name in found}


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def room_of(path):
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", [*files("torchtune_qwen25vl"), *files("recipes")], ids=str)
def test_the_package_imports_what_it_declares(path):
    assert imported(path, when_used=False) <= names(CORE), "what is loaded is in the core"
    extra = EXTRAS.get(EXTRA_OF.get(room_of(path)), [])
    assert imported(path) <= names(CORE) | names(extra) | HOSTS.get(room_of(path), set())


@pytest.mark.parametrize("path", files("parity"), ids=str)
def test_parity_imports_what_its_extra_declares(path):
    others = {"vllm"} if path in RUN_BY_VLLM else set()
    assert imported(path) <= names(CORE) | names(EXTRAS["parity"]) | others


@pytest.mark.parametrize("path", RUN_BY_VLLM, ids=str)
def test_what_runs_beside_vllm_imports_nothing_of_ours(path):
    assert not re.findall(
        r"^\s*(?:from|import) (?:parity|torchtune)", path.read_text(), re.MULTILINE
    )


def test_tests_import_what_is_declared():
    local = {path.stem.replace("_", "-") for path in files("tests")}
    declared = names(CORE) | names(DEV) | names(ALL_EXTRAS) | set().union(*HOSTS.values())
    used = set().union(*(imported(path) for path in files("tests")))
    assert used - local <= declared


def test_nothing_is_declared_for_nothing():
    paths = [*files("torchtune_qwen25vl"), *files("recipes"), *files("parity")]
    used = set().union(*(imported(path) for path in paths))
    assert names(CORE) - used == FOR_OTHERS
    assert names(ALL_EXTRAS) - used == BY_NAME


@pytest.mark.parametrize("folder", ["torchtune_qwen25vl", "recipes"])
def test_the_package_does_not_name_parity(folder):
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    assert [path for path in paths if re.search(r"\bparity\b", path.read_text())] == []
