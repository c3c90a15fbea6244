"""A recipe from its start to its end, on this rank."""

from collections.abc import Callable

import torch
from torchtune import training

from torchtune_qwen25vl.device import look
from torchtune_qwen25vl.training._recipe import Recipe
from torchtune_qwen25vl.training._settings import Settings


def run(recipe: Callable[[], Recipe], settings: Settings) -> None:
    """Run a recipe, or export a checkpoint of it, on this rank of those that torchrun started.

    Args:
        recipe: makes the recipe, once the ranks know each other
        settings: settings of the run
    """
    distributed = training.is_distributed()
    if distributed:
        backend = training.get_distributed_backend(look(settings.device).device.type)
        torch.distributed.init_process_group(backend)
    made = recipe()
    if settings.export is not None:
        print(f"{settings.export} is exported to {made.export(settings.export)}")
    else:
        made.setup()
        made.train()
        made.finish(made.save())
    if distributed:
        torch.distributed.destroy_process_group()
