"""Runs configs on a tiny model, in this process or in two of their own."""

import re
import sys

import gloo_shim
import on_ranks
import pytest
from torchtune.modules.peft import _utils as peft

from torchtune_qwen25vl import _cli

SMALL = [
    "device=cpu",
    "seed=0",
    "batch_size=2",
    "gradient_accumulation_steps=1",
    "epochs=2",
]
OF_STOCK_RECIPES = ["dtype=fp32", "shuffle=False", "max_steps_per_epoch=2", "optimizer.lr=1e-3"]


def run_alone(name, folder, rows, output_dir, changes=()):
    """Run a config for one device in this process, as a user does."""
    words = ["tune-qwen25vl", "run", _cli.recipe_of(path_of(name)), "--config", name]
    words += overrides(name, folder, rows, output_dir, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(peft, "_get_lora_modules", gloo_shim.copy_then_list)
        with pytest.raises(SystemExit) as done:
            _cli.main()
    assert not done.value.code


def path_of(name):
    return _cli._configs()[name]


def overrides(name, folder, rows, output_dir, changes=()):
    """What stands behind the config on the command line."""
    own = [f"model_dir={folder}", f"dataset.source={rows}", f"output_dir={output_dir}"]
    of_recipe = OF_STOCK_RECIPES if "/" in name else ["precision=fp32"]
    return [*own, *SMALL, *of_recipe, *changes]


def losses(output_dir):
    """The loss of every step, in the order in which they were logged."""
    logs = (path.read_text() for path in sorted((output_dir / "logs").iterdir()))
    return [float(loss) for loss in re.findall(r"loss:(\S+)", "".join(logs))]


def run_distributed(runs, folder, rows, base):
    """Run these, each in a folder of its title, on one pair of processes."""
    words = []
    for title, (name, kind, changes) in runs:
        recipe = [_cli.recipe_of(path_of(name)), "--config", str(path_of(name))]
        own = overrides(name, folder(kind), rows, base / title, ["batch_size=1", *changes])
        words.append([*recipe, *own])
    on_ranks.succeed(2, lambda: gloo_shim.main(words))
