"""Generation by a model that is being trained, between two of its steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from torchtune_qwen25vl.device import release_cache
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.training._precision import Precision
from torchtune_qwen25vl.training._reference import shard_again


@contextmanager
def answering(model: Qwen25VL, precision: Precision) -> Iterator[None]:
    """Have a model generate in the precision of its training, and leave no trace of it.

    Layers that are compiled for training run as they are written, as each token would have them
    compiled anew. Afterwards the model is sharded as before and memory is given back.

    Args:
        model: model in training
        precision: precision of the training
    """
    device = model.device.type
    mixes = precision == "bf16_mixed"
    products = torch.autocast(device, torch.bfloat16, enabled=mixes, cache_enabled=False)
    with torch.compiler.set_stance("force_eager"), products:
        yield
    shard_again(model)
    release_cache(model.device)
