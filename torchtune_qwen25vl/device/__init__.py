"""Where and how a model runs: chosen by asking torch, checked before anything is loaded.

look               describe a device
choose             choose how to run a model there
choose_kernels     choose the library that multiplies on a CPU
CpuKernels         which libraries there are, or auto
Choice             device, dtype, attention, NF4 or not, and why
Load               what a model will be given
check_model        everything that can be known before loading, in one table
load               load a model as chosen
use_kernels        pack the weights of a loaded model, if that is chosen
LoadedModel        a checkpoint whose weights are loaded on first use and can be released
processor_of       folder of a model's processor, which may be an adapter's
attention_kernels  restrict torch's attention to the kernels of a choice
is_out_of_memory   tell running out of memory from other errors
release_cache      give back the memory that torch keeps for later
MOST_PIXELS        most pixels of an image that memory is asked for
"""

from torchtune_qwen25vl.device._choice import (
    Choice,
    CpuKernels,
    attention_kernels,
    choose,
    choose_kernels,
)
from torchtune_qwen25vl.device._loading import LoadedModel, load, use_kernels
from torchtune_qwen25vl.device._machine import look
from torchtune_qwen25vl.device._memory import MOST_PIXELS, is_out_of_memory, release_cache
from torchtune_qwen25vl.device._preflight import Load, check_model, processor_of

__all__ = [
    "MOST_PIXELS",
    "Choice",
    "CpuKernels",
    "Load",
    "LoadedModel",
    "attention_kernels",
    "check_model",
    "choose",
    "choose_kernels",
    "is_out_of_memory",
    "load",
    "look",
    "processor_of",
    "release_cache",
    "use_kernels",
]
