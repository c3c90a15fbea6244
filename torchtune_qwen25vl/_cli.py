"""`tune-qwen25vl`: torchtune's command line, with our recipes and configs beside its own.

torchtune finds recipes and configs in a registry that a package cannot add to from outside, so this
program adds to it and then calls torchtune's. A recipe is a file of the recipes folder under its
plain name; a config is a file of `configs/` under its path without ".yaml", and belongs to the
recipe that the launch command in its header names, which may be one of torchtune's.
"""

import argparse
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torchtune import _recipe_registry
from torchtune._cli.tune import TuneCLIParser
from torchtune._recipe_registry import Config, Recipe

_HERE = Path(__file__).resolve().parent
# inside the package where a wheel installed it, beside the package in a checkout
RECIPES = next(path for path in (_HERE / "recipes", _HERE.parent / "recipes") if path.is_dir())

_LAUNCH = re.compile(r"^# +tune-qwen25vl run .*?(\w+) --config \S+", re.MULTILINE)


def main() -> None:
    """Run the command line."""
    add_to_registry()
    tune = TuneCLIParser()
    tune._parser.description = "torchtune's command line, with Qwen2.5-VL's recipes and configs."
    _rename(tune._parser)
    args = tune.parse_args()
    if hasattr(args, "config"):  # `validate` takes a path only
        args.config = _configs().get(str(args.config), args.config)
    try:
        tune.run(args)
    except ChildFailedError as error:  # each process has said what it had to say
        codes = [failure.exitcode for failure in error.failures.values()]
        # that of a signal as a shell says it
        raise SystemExit(max(code if code > 0 else 128 - code for code in codes)) from error


def caption(words: Sequence[str] | None = None) -> int:
    """Run `caption`, the short command of that recipe; return its exit code.

    `caption photos key=value` is `tune-qwen25vl run caption --config caption inputs=photos
    key=value`.

    Args:
        words: those behind the command; None for those of this process
    """
    return load_recipe("caption").main(words)


def load_recipe(name: str) -> ModuleType:
    """Import a recipe, which is a file of the recipes folder and in no package."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def add_to_registry() -> None:
    """Add our recipes and configs to torchtune's registry, once."""
    recipes = {recipe.name: recipe for recipe in _recipe_registry._ALL_RECIPES}
    for path in sorted(RECIPES.glob("*.py")):
        if path.stem not in recipes:
            recipe = Recipe(path.stem, str(path), configs=[], supports_distributed=True)
            recipes[path.stem] = recipe
            _recipe_registry._ALL_RECIPES.append(recipe)
    for name, path in _configs().items():
        recipe = recipes[recipe_of(path)]
        if name not in (config.name for config in recipe.configs):
            # joined to torchtune's own folder later, which an absolute path survives
            recipe.configs.append(Config(name, str(path)))


def recipe_of(config: Path) -> str:
    """The recipe for which a config is made, by the launch command in its header."""
    launch = _LAUNCH.search(config.read_text())
    assert launch is not None, f"the header of {config} has no launch command"
    return launch[1]


def _configs() -> dict[str, Path]:
    folder = RECIPES / "configs"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }


def _rename(parser: argparse.ArgumentParser) -> None:
    """Say "tune-qwen25vl" wherever the help of torchtune's parser says "tune"."""
    texts: list[tuple[object, str]] = [
        (parser, name) for name in ("prog", "usage", "description", "epilog")
    ]
    for action in parser._actions:
        texts.append((action, "help"))
        if isinstance(action, argparse._SubParsersAction):
            texts += [(choice, "help") for choice in action._choices_actions]
            for command in action.choices.values():
                _rename(command)
    for owner, name in texts:
        if text := getattr(owner, name):
            setattr(owner, name, re.sub(r"\btune\b", "tune-qwen25vl", text))


if __name__ == "__main__":
    main()
