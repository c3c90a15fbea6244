"""`tune-qwen25vl`: torchtune's command line, with our recipes and configs beside its own.

torchtune finds recipes and configs in a registry that a package cannot add to from outside, so this
program adds to it and then calls torchtune's. A recipe is a file of the recipes folder under its
plain name; a config is a file of `configs/` under its path without ".yaml", and belongs to the
recipe that the launch command in its header names, which may be one of torchtune's. What a config
is for stands in the first line of its header, and `ls` shows it.
"""

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torchtune import _recipe_registry
from torchtune._cli.run import ROOT
from torchtune._cli.tune import TuneCLIParser
from torchtune._recipe_registry import Config, Recipe
from yaml import YAMLError

from torchtune_qwen25vl import captioning, conditioning, evaluation, jobs, training
from torchtune_qwen25vl import hidden_states as states
from torchtune_qwen25vl._rounding import warnings_of

RECIPES = Path(__file__).parent / "recipes"
JOBS: dict[str, type[jobs.JobSettings]] = {
    "caption": captioning.Settings,
    "hidden_states": states.Settings,
    "embed_prompts": conditioning.Settings,
    "image": conditioning.ImageSettings,
    "evaluate": evaluation.Settings,
}

_Text = TypeVar("_Text", str, str | None)
_LAUNCH = re.compile(r"^# +tune-qwen25vl run .*?(\w+) --config \S+", re.MULTILINE)


def main() -> None:
    """Run the command line."""
    add_to_registry()
    tune = TuneCLIParser()
    tune._parser.description = "torchtune's command line, with Qwen2.5-VL's recipes and configs."
    _rename(tune._parser)
    commands = _commands(tune._parser)
    commands["ls"].set_defaults(func=lambda _: print(table()))
    for name, ours in (("validate", validate), ("cp", copy)):
        commands[name].set_defaults(func=partial(ours, commands[name].get_default("func")))
    args = tune.parse_args()
    if hasattr(args, "config"):  # `validate` takes a path only
        args.config = _configs().get(str(args.config), args.config)
    if {"-h", "--help"} & set(getattr(args, "recipe_args", [])):
        print(recipe_help(args.recipe))
        return
    try:
        _check_run(args)
        tune.run(args)
    except ChildFailedError as error:  # each process has said what it had to say
        codes = [failure.exitcode for failure in error.failures.values()]
        # a shell reports an end by signal N as 128 + N
        raise SystemExit(max(code if code > 0 else 128 - code for code in codes)) from error


def _check_run(args: argparse.Namespace) -> None:
    """Refuse what torchtune would end with a traceback: a recipe or a config that is not there.

    Raises:
        SystemExit: with 2 after one line.
    """
    if not hasattr(args, "recipe_args"):
        return
    known = {recipe.name for recipe in _recipe_registry.get_all_recipes()}
    if args.recipe not in known and not Path(args.recipe).exists() and not _is_module(args.recipe):
        _refuse(f"there is no recipe {args.recipe}; see tune-qwen25vl ls")
    if args.recipe_args[-1:] == ["--config"]:
        _refuse("--config needs a name or a file: write --config NAME")
    if "--config" in args.recipe_args:
        path = Path(args.recipe_args[args.recipe_args.index("--config") + 1])
        if path.is_file():
            _load(path)


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _load(path: Path) -> DictConfig:
    """Read a config.

    Raises:
        SystemExit: with 2 after one line, if it cannot be read or holds no keys.
    """
    try:
        cfg = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError) as error:
        _refuse(f"{path} cannot be read as YAML: {' '.join(str(error).split())}")
    if not isinstance(cfg, DictConfig):
        _refuse(f"{path} holds no keys; a config is key: value, one a line")
    return cfg


def _refuse(line: str) -> NoReturn:
    print(line, file=sys.stderr)
    raise SystemExit(2)


def caption(words: Sequence[str] | None = None) -> int:
    """Run `caption`, the short command of that recipe; return its exit code.

    `caption photos key=value` is `tune-qwen25vl run caption --config caption inputs=photos
    key=value`.

    Args:
        words: those behind the command; None for those of this process
    """
    return import_module("torchtune_qwen25vl.recipes.caption").main(words)


def hidden_states(words: Sequence[str] | None = None) -> int:
    """Run `hidden-states`, the short command of that recipe, likewise."""
    return import_module("torchtune_qwen25vl.recipes.hidden_states").main(words)


def embed_prompts(words: Sequence[str] | None = None) -> int:
    """Run `embed-prompts`, the short command of that recipe, likewise."""
    return import_module("torchtune_qwen25vl.recipes.embed_prompts").main(words)


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
            # torchtune joins this to a folder of its own, which an absolute path survives
            recipe.configs.append(Config(name, str(path)))


def recipe_of(config: Path) -> str:
    """Name the recipe for which a config is made, by the launch command in its header."""
    launch = _LAUNCH.search(config.read_text())
    assert launch is not None, f"the header of {config} has no launch command"
    return launch[1]


def table() -> str:
    """List every recipe with its configs: torchtune's, and then ours, each with what it is for."""
    ours = _configs()
    rows = [("RECIPE", "CONFIG", "")]
    for listed in (False, True):
        for recipe in _recipe_registry.get_all_recipes():
            names = [config.name for config in recipe.configs if (config.name in ours) == listed]
            if not recipe.configs and not listed:
                names = ["<>"]  # as `tune ls` says none
            for first, name in zip([recipe.name, *[""] * len(names)], names, strict=False):
                rows.append((first, name, _description(ours[name]) if name in ours else ""))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"{recipe:{widths[0]}}  {config:{widths[1]}}  {what}".rstrip()
        for recipe, config, what in rows
    )


def copy(stock: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Copy by torchtune's `stock`, but to a YAML the config, whose name a recipe may have too."""
    source, target = _configs().get(args.file), args.destination
    if source is None or target.suffix != ".yaml":
        stock(args)
    elif args.no_clobber and target.exists():
        print(f"{target} is there already, and stays as it is")
    else:
        try:
            if args.make_parents:
                target.parent.mkdir(parents=True, exist_ok=True)
            print(f"Copied file to {shutil.copy(source, target)}")
        except OSError as error:
            _refuse(f"{target} cannot be written: {error}")


def validate(components: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Check the keys of a config for one of our recipes, as it would, and then all components.

    Args:
        components: torchtune's check of what the config's components are called with
        args: `config` is the file

    Raises:
        SystemExit: with 2 if something is wrong, which is printed.
    """
    cfg = _load(args.config)
    launch = _LAUNCH.search(args.config.read_text())
    recipe = launch[1] if launch else None
    try:
        if recipe in (*training.SETTINGS, *JOBS):
            _check_keys(recipe, cfg)
            for warning in warnings_of(cfg):
                print(warning)
        else:
            belongs = f"belongs to {recipe}" if recipe else "names no recipe in its header"
            print(f"{args.config} {belongs}, so components are checked and keys are not")
    except (ValueError, OmegaConfBaseException) as error:
        _refuse(f"{args.config}: {' '.join(str(error).split())}")
    components(args)


def _check_keys(recipe: str, cfg: DictConfig) -> None:
    """Read the settings of a recipe of ours as it does."""
    if recipe in training.SETTINGS:
        settings: training.Settings = training.read_settings(cfg, training.SETTINGS[recipe])
        training.tuning(training.read_parts(settings.parts), settings.adapters or {})
        if settings.eval_by_generation is not None:
            evaluation.read_section(settings.eval_by_generation)
    else:
        if cfg.get("inputs") is None and cfg.get("source") is None:
            cfg.inputs = "."  # a config may leave them to the command line
        jobs.read_settings(cfg, JOBS[recipe])


def recipe_help(name: str) -> str:
    """Say what a recipe does, which configs it has, and the keys of the first of ours.

    Raises:
        SystemExit: if there is no such recipe.
    """
    recipes = {recipe.name: recipe for recipe in _recipe_registry.get_all_recipes()}
    if name not in recipes:
        raise SystemExit(f"there is no recipe {name}; see tune-qwen25vl ls")
    module = ast.parse((ROOT / "recipes" / recipes[name].file_path).read_text())
    classes = [node for node in module.body if isinstance(node, ast.ClassDef)]
    documented = filter(None, map(ast.get_docstring, [module, *classes]))
    ours = _configs()
    listed = [config.name for config in recipes[name].configs]
    parts = [next(documented, f"{name} describes itself nowhere.")]
    width = max(map(len, listed), default=0)
    rows = [f"  {one:{width}}  {_description(ours[one]) if one in ours else ''}" for one in listed]
    parts.append("\n".join(["Configs, for --config:", *map(str.rstrip, rows)]))
    if own := [one for one in listed if one in ours]:
        parts.append(f"Keys, set by key=value behind the command, as {own[0]} has them:")
        parts.append(ours[own[0]].read_text().partition("\n\n")[2].rstrip())
    return "\n\n".join(parts)


def _description(config: Path) -> str:
    """What a config is for: the first line of its header."""
    return config.read_text().partition("\n")[0].removeprefix("# ").removesuffix(".")


def _configs() -> dict[str, Path]:
    folder = RECIPES / "configs"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yaml"))
    }


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands of a parser, by name."""
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def _rename(parser: argparse.ArgumentParser) -> None:
    """Say "tune-qwen25vl" wherever the help of torchtune's parser says "tune"."""
    parser.prog = _renamed(parser.prog)
    parser.usage = _renamed(parser.usage)
    parser.description, parser.epilog = _renamed(parser.description), _renamed(parser.epilog)
    for action in parser._actions:
        action.help = _renamed(action.help)
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                choice.help = _renamed(choice.help)
            for command in action.choices.values():
                _rename(command)


def _renamed(text: _Text) -> _Text:
    return re.sub(r"\btune\b", "tune-qwen25vl", text) if text else text


if __name__ == "__main__":
    main()
