"""The words of a short command: `caption photos preset=detailed --dry-run`.

`key=value` sets a key, `--some-key` is short for `some_key=True`, `--config FILE` takes another
YAML, and every other word is an input. A job may have more words that take a file.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

from torchtune_qwen25vl.jobs._settings import JobSettings, kinds_of

_KEY_VALUE = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*=", re.IGNORECASE)


def read_words(words: Sequence[str], config: Path, settings: type[JobSettings]) -> DictConfig:
    """Make the config that the words of a command line ask for.

    Texts are taken as they are typed, spaces and colons too, `key=` is an empty one and `key=null`
    none; where several are allowed, `key=[one,two]` is a list. All other values are YAML.

    Args:
        words: those behind the command
        config: YAML that they change, unless they name another
        settings: class of the keys, which says which of them are texts

    Raises:
        ValueError: if a value is no YAML, or there is no such config.
    """
    words, files = list(words), {"config": str(config)}
    for key in ("config", *settings.file_words):
        if (word := f"--{key}") in words:
            at = words.index(word)
            files[key] = (words[at + 1 : at + 2] or [""])[0]
            del words[at : at + 2]
    path = files.pop("config")
    try:
        cfg = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config needs a YAML that can be read: {error}") from error
    assert isinstance(cfg, DictConfig)
    kinds, inputs = kinds_of(settings), []
    for key, file in files.items():
        if not file:
            raise ValueError(f"--{key} needs a file: write --{key} FILE")
        _set(cfg, kinds, key, file)
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if not equals and kinds.get(name, bool) is not bool:
                raise ValueError(f"{word} needs a value: write {word}=VALUE")
            _set(cfg, kinds, name, value if equals else "True")
        elif _KEY_VALUE.match(word):
            _set(cfg, kinds, *word.split("=", 1))
        else:
            inputs.append(_plain(word))
    if inputs:
        cfg.inputs = inputs
    return cfg


def _set(cfg: DictConfig, kinds: Mapping[str, Any], key: str, typed: str) -> None:
    kind = kinds.get(key)
    value: Any = _plain(typed)
    may_be_list = key == "inputs" or ListConfig in get_args(kind)
    is_text = key == "inputs" or kind is str or str in get_args(kind)
    if not is_text or (may_be_list and typed[:1] == "["):
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={typed}"]), key)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}={typed} is no value: {error}") from error
    elif typed == "null" and kind is not str:
        value = None
    OmegaConf.update(cfg, key, value)


def _plain(text: str) -> str:
    """Write text so that a config sees no interpolation in it, whatever it holds."""
    return text.replace("${", r"\${")
