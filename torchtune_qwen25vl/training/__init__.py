"""What a training loop needs beside the model: batches, steps, parts, speed, checkpoints.

Settings           every key of the YAML, checked
read_settings      read them
Part               how vision, merger or decoder is trained
read_parts         read one of each
tuning             the arguments of Tuning that they ask for
count_steps        steps of a run
warmup_steps       steps in which the rates rise
describe           the plan of a run, printed first
make_model         build, shard and fill the model of a run
trained_names      names of its weights that are trained
parameter_groups   groups of the optimiser, one for each trained part
MuonAdamW          optimiser for models trained from nothing
StochasticAdamW    AdamW that loses no small update of weights in bf16
Share              how the samples of a step are shared out over ranks
TrainSampler       the samples of every step
ValidationSampler  every sample once
make_loader        batches of one step after another, prepared by workers
StepCollate        samples of a step to batches, padded or packed
StepBatches        one rank's share of one step
to_device          move it to the device
equal_numbers      as many batches on every rank
seed_step          seed what the model draws in a step
summed_loss        summed cross entropy of a batch
train_step         forward, backward, checks and the optimiser
StepResult         what a step came to
mean_loss          loss of validation data
GradientCheck      every trained part has gradients, every frozen part none
Throughput         speed, memory and waiting time
save_step          write a checkpoint
last_checkpoint    the one to go on from
load_step          go on from it
set_aside          rename all there are, to begin anew
gather_weights     copy all weights to the first rank
save_model         write a folder for transformers, adapters merged
save_adapter       write a folder for PEFT
"""

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
from torchtune_qwen25vl.training._plan import count_steps, describe, warmup_steps
from torchtune_qwen25vl.training._samples import (
    Share,
    TrainSampler,
    ValidationSampler,
    make_loader,
    seed_step,
)
from torchtune_qwen25vl.training._settings import Settings, read_settings
from torchtune_qwen25vl.training._state import last_checkpoint, load_step, save_step, set_aside
from torchtune_qwen25vl.training._step import StepResult, mean_loss, summed_loss, train_step
from torchtune_qwen25vl.training._stochastic import StochasticAdamW
from torchtune_qwen25vl.training._throughput import Throughput

__all__ = [
    "GradientCheck",
    "MuonAdamW",
    "Part",
    "Settings",
    "Share",
    "StepBatches",
    "StepCollate",
    "StepResult",
    "StochasticAdamW",
    "Throughput",
    "TrainSampler",
    "ValidationSampler",
    "count_steps",
    "describe",
    "equal_numbers",
    "gather_weights",
    "last_checkpoint",
    "load_step",
    "make_loader",
    "make_model",
    "mean_loss",
    "parameter_groups",
    "read_parts",
    "read_settings",
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
    "warmup_steps",
]
