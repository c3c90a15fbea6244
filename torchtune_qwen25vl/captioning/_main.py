"""`caption`: the short command of the recipe of that name, and the words of both."""

import re
import runpy
import sys
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from torchtune_qwen25vl._cli import RECIPES
from torchtune_qwen25vl.captioning._settings import Settings

USAGE = """usage: caption INPUT... [--dry-run] [--retry-failed] [key=value...] [--config FILE]

Writes a caption for every image of the inputs: folders, images, patterns, lists, tables.
`--some-key` is short for some_key=True. These are the keys, with the values they have by default:

"""
CONFIG = RECIPES / "configs" / "caption.yaml"
_KINDS = get_type_hints(Settings)
_KEY_VALUE = re.compile(r"[a-z_]+(\.[a-z_]+)*=", re.IGNORECASE)


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of the command line; returns its exit code.

    The same as `tune-qwen25vl run caption --config caption inputs=[...] key=value...`.
    """
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help"} & set(words):
        print(USAGE + CONFIG.read_text("utf-8"))
        return 0 if words else 2
    return runpy.run_path(str(RECIPES / "caption.py"))["run_words"](words)


def read_words(words: Sequence[str]) -> DictConfig:
    """The config that the words of a command line make; a word that is no key is an input.

    Texts are taken as they are typed, spaces and colons too, `key=` is an empty one and `key=null`
    none; all else is YAML.

    Raises:
        ValueError: if a value is no YAML, or there is no such config.
    """
    words, path = list(words), str(CONFIG)
    if "--config" in words:
        at = words.index("--config")
        path = (words[at + 1 : at + 2] or [""])[0]
        del words[at : at + 2]
    try:
        cfg = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config needs a YAML that can be read: {error}") from error
    assert isinstance(cfg, DictConfig)
    inputs = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not equals and _KINDS.get(name, bool) is not bool:
                raise ValueError(f"{word} needs a value: write {word}=VALUE")
            _set(cfg, name, value if equals else "True")
        elif _KEY_VALUE.match(word):
            _set(cfg, *word.split("=", 1))
        else:
            inputs.append(_plain(word))
    if inputs:
        cfg.inputs = inputs
    return cfg


def _set(cfg: DictConfig, key: str, typed: str) -> None:
    kind = _KINDS.get(key)
    value: Any = _plain(typed)
    is_text = kind is str or str in get_args(kind) or (key == "inputs" and typed[:1] != "[")
    if not is_text:
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={typed}"]), key)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}={typed} is no value: {error}") from error
    elif typed == "null" and kind is not str:
        value = None
    OmegaConf.update(cfg, key, value)


def _plain(text: str) -> str:
    """Text that is no interpolation of a config, whatever it holds."""
    return text.replace("${", r"\${")
