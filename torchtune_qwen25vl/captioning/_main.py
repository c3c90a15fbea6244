"""`caption`: the short command of the recipe of that name."""

import re
import runpy
import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from torchtune_qwen25vl._cli import RECIPES

USAGE = """usage: caption INPUT... [--dry-run] [--retry-failed] [key=value...]

Writes a caption for every image of the inputs: folders, images, patterns, lists, tables.
`--some-key` is short for some_key=True. These are the keys, with the values they have by default:

"""
_KEY_VALUE = re.compile(r"[a-z_]+(\.[a-z_]+)*=", re.IGNORECASE)


def main(words: Sequence[str] | None = None) -> int:
    """Run the recipe on the words of the command line; returns its exit code.

    The same as `tune-qwen25vl run caption --config caption inputs=[...] key=value...`.
    """
    words = sys.argv[1:] if words is None else words
    path = RECIPES / "configs" / "caption.yaml"
    if not words or {"-h", "--help"} & set(words):
        print(USAGE + path.read_text("utf-8"))
        return 0 if words else 2
    try:
        cfg = read_words(words, OmegaConf.load(path))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return runpy.run_path(str(RECIPES / "caption.py"))["run"](cfg)


def read_words(words: Sequence[str], cfg: DictConfig) -> DictConfig:
    """The config with what the command line says in it; a word that is no key is an input."""
    changes = [word for word in words if _KEY_VALUE.match(word)]
    flags = [word for word in words if word.startswith("--")]
    inputs = [word for word in words if word not in changes and word not in flags]
    for flag in flags:
        name, _, value = flag.removeprefix("--").partition("=")
        changes.append(f"{name.replace('-', '_')}={value or 'True'}")
    changes = [f"{word}''" if word.endswith("=") else word for word in changes]  # empty, not null
    cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(changes))
    if inputs:
        # an interpolation is nothing that a path should cause
        cfg.inputs = [word.replace("${", r"\${") for word in inputs]
    return cfg
