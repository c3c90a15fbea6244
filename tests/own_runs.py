"""Runs of our own recipes in this process, or in forks of it."""

import ast
import importlib.util
import inspect
import os
import signal
import time
from pathlib import Path

import on_ranks
import torch
from finetune_runs import logged
from forked import fork
from omegaconf import OmegaConf
from safetensors.torch import load_file

from torchtune_qwen25vl.training import Recipe

ROOT = Path(__file__).parents[1]
SECONDS = 240  # until a checkpoint is there


def path_of(name):
    """File of a recipe."""
    return ROOT / "recipes" / f"{name}.py"


def module_of(name):
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location(name, path_of(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def class_of(name):
    """The recipe's class."""
    (kind,) = (
        value
        for value in vars(module_of(name)).values()
        if inspect.isclass(value) and issubclass(value, Recipe)
    )
    return kind


def make(name, cfg):
    """The recipe of that name, before it is set up."""
    return class_of(name)(OmegaConf.create(cfg))


def unread(name, settings):
    """Settings that neither the recipe's file reads nor what it is made of."""
    bases = [base for base in class_of(name).__mro__ if base.__module__.startswith("torchtune_q")]
    files = {path_of(name), *(Path(inspect.getfile(base)) for base in bases)}
    trees = (ast.parse(file.read_text()) for file in files)
    used = {n.attr for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return settings.__dataclass_fields__.keys() - used


def own_settings(settings):
    """Settings that are not those of the recipe finetune."""
    return settings.__dataclass_fields__.keys() - settings.__base__.__dataclass_fields__.keys()


def run(name, cfg):
    """Run a recipe, and return it."""
    made = make(name, cfg)
    made.setup()
    made.train()
    made.finish(made.save())
    return made


def kill_behind(name, cfg, checkpoint):
    """Run a recipe in a process that is killed once a checkpoint is there."""
    output_dir = Path(cfg.output_dir)
    said = output_dir.with_suffix(".err")

    def body():
        run(name, cfg)
        return 0

    child = fork(body, said)
    try:
        end = time.monotonic() + SECONDS
        while not (output_dir / checkpoint).exists():
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            assert not ended, f"the run ended by itself: {said.read_text()[-5000:]}"
            assert time.monotonic() < end, f"no {checkpoint} in {SECONDS} s"
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def assert_goes_on_after_sigkill(name, config, output_dir, figures):
    """A run that is killed behind a checkpoint and goes on is one that never stopped, bit for bit.

    Args:
        name: of the recipe
        config: makes its config, from an output folder and changes
        output_dir: where both runs write
        figures: what is compared of every step
    """
    killed = config(output_dir / "killed", max_steps=10**6, save_every_n_steps=2)
    kill_behind(name, killed, "step_2")
    last = module_of(name).ours.last_checkpoint(output_dir / "killed")
    killed.max_steps = int(last.name.removeprefix("step_")) + 2
    whole = config(output_dir / "whole", max_steps=killed.max_steps, save_every_n_steps=2)
    for cfg in (killed, whole):
        run(name, cfg)
    one, other = logged(killed.output_dir), logged(whole.output_dir)
    for step in range(1, killed.max_steps + 1):
        for figure in figures:
            assert one[step][figure] == other[step][figure], (step, figure)
    files = (Path(c.output_dir) / "model" / "model.safetensors" for c in (killed, whole))
    weights = [load_file(file) for file in files]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def run_on_two(name, cfgs):
    """Run a recipe by two processes, once for each config."""

    def body():
        torch.distributed.init_process_group("gloo")
        for cfg in cfgs:
            run(name, cfg)
        torch.distributed.destroy_process_group()
        return 0

    on_ranks.succeed(2, body)
