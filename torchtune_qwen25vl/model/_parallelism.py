"""Tensor parallelism: which linear layers are split over devices."""

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle


def tensor_parallel_plan(
    model: nn.Module | None = None, *, enable_fp8_training: bool = False
) -> dict[str, ParallelStyle]:
    """Split the decoder by heads and by inner width; the vision encoder is whole on every device.

    Every layer takes and returns whole hidden states, since images are put in place between the
    embedding and the first one. (torchtune's own plan splits the sequence there as of its
    development version.)

    Args:
        model: not used; torchtune's recipes pass it
        enable_fp8_training: must be False; torchtune's recipes pass it

    Raises:
        ValueError: if fp8 is asked for.
    """
    if enable_fp8_training:
        raise ValueError("tensor_parallel_plan splits no fp8 layers; set enable_fp8_training False")
    return {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attn.q_proj": ColwiseParallel(),
        "layers.*.attn.k_proj": ColwiseParallel(),
        "layers.*.attn.v_proj": ColwiseParallel(),
        "layers.*.attn.output_proj": RowwiseParallel(),
        "layers.*.mlp.w1": ColwiseParallel(),
        "layers.*.mlp.w3": ColwiseParallel(),
        "layers.*.mlp.w2": RowwiseParallel(),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
