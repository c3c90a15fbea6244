"""Where and how a model runs: chosen by asking torch, checked before anything is loaded."""

from torchtune_qwen25vl.device._choice import Choice, attention_kernels, choose
from torchtune_qwen25vl.device._loading import LoadedModel, load, switch_model
from torchtune_qwen25vl.device._machine import Machine, look
from torchtune_qwen25vl.device._memory import (
    MOST_PIXELS,
    Footprint,
    is_out_of_memory,
    pixel_budget,
    release_cache,
    token_budget,
    weights_bytes,
)
from torchtune_qwen25vl.device._preflight import Check, Load, Preflight, check_model
from torchtune_qwen25vl.weights import bytes_to_fetch, fetch

__all__ = [
    "MOST_PIXELS",
    "Check",
    "Choice",
    "Footprint",
    "Load",
    "LoadedModel",
    "Machine",
    "Preflight",
    "attention_kernels",
    "bytes_to_fetch",
    "check_model",
    "choose",
    "fetch",
    "is_out_of_memory",
    "load",
    "look",
    "pixel_budget",
    "release_cache",
    "switch_model",
    "token_budget",
    "weights_bytes",
]
