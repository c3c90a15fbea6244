"""What a training loop needs beside the model: batches, steps, parts, speed, checkpoints."""

from torchtune_qwen25vl.training._batches import StepBatches, StepCollate, equal_numbers, to_device
from torchtune_qwen25vl.training._model import gather_weights, make_model, save_adapter, save_model
from torchtune_qwen25vl.training._muon import MuonAdamW
from torchtune_qwen25vl.training._parts import (
    GradientCheck,
    Part,
    parameter_groups,
    read_parts,
    trained_names,
    tuning,
)
from torchtune_qwen25vl.training._samples import (
    Share,
    TrainSampler,
    ValidationSampler,
    make_loader,
    seed_step,
)
from torchtune_qwen25vl.training._settings import check_component, check_settings
from torchtune_qwen25vl.training._state import last_checkpoint, load_step, save_step, set_aside
from torchtune_qwen25vl.training._step import StepResult, mean_loss, summed_loss, train_step
from torchtune_qwen25vl.training._throughput import Throughput
from torchtune_qwen25vl.weights import find_weights

__all__ = [
    "GradientCheck",
    "MuonAdamW",
    "Part",
    "Share",
    "StepBatches",
    "StepCollate",
    "StepResult",
    "Throughput",
    "TrainSampler",
    "ValidationSampler",
    "check_component",
    "check_settings",
    "equal_numbers",
    "find_weights",
    "gather_weights",
    "last_checkpoint",
    "load_step",
    "make_loader",
    "make_model",
    "mean_loss",
    "parameter_groups",
    "read_parts",
    "save_adapter",
    "save_model",
    "save_step",
    "seed_step",
    "set_aside",
    "summed_loss",
    "to_device",
    "train_step",
    "trained_names",
    "tuning",
]
