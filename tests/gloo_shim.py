"""Runs torchtune's distributed recipes on CPU, one after another: what each rank runs here.

The recipe files are torchtune's own. Replaced is what a machine without a GPU does not have (the
nccl backend, statistics and caches of device memory, barriers named by device), and the process
group outlives a recipe so that the next one finds it.
"""

import runpy
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torchtune import training
from torchtune._cli.run import ROOT
from torchtune.modules.peft._utils import _get_lora_modules


def main(runs: Iterable[list[str]]) -> int:
    """Run every recipe by its words, its name the first; return an exit code."""
    adapt()
    for recipe, *arguments in runs:
        path = ROOT / "recipes" / f"{recipe}.py"
        sys.argv = [str(path), *arguments]
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as done:
            if done.code:
                raise
    return 0


def adapt() -> None:
    """Take the place of what needs a GPU."""
    barrier = torch.distributed.barrier
    torch.distributed.init_process_group("gloo")

    def nothing(*_: Any, **__: Any) -> dict[str, float]:
        return {}

    for name in ("init_process_group", "destroy_process_group"):
        setattr(torch.distributed, name, nothing)
    torch.distributed.barrier = lambda *_, **__: barrier()
    training.get_memory_stats = training.log_memory_stats = nothing
    torch.cpu.empty_cache = torch.cpu.reset_peak_memory_stats = nothing


def copy_then_list(state_dict: dict[str, Any], list_modules: Any = _get_lora_modules) -> set[str]:
    """Takes the place of `_get_lora_modules` in the recipes for one device.

    Adapters are merged in place, and on a CPU what is merged is not a copy of the weights.
    """
    state_dict.update({key: weight.clone() for key, weight in state_dict.items()})
    return list_modules(state_dict)
