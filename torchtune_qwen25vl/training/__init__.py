"""What a training loop needs beside the model: batches, steps, parts, speed, checkpoints.

Recipe             a run, but for what a step is
TreeRecipe         the same on batches of trees: a prompt once, and what it is held against
run                run a recipe on this rank
Settings           every key of the YAML, checked
PreferenceSettings the same of the recipe preference
DistillSettings    the same of the recipe distill
PolicySettings     the same of the recipe policy
SETTINGS           settings of each recipe
read_settings      read them
Part               how vision, merger or decoder is trained
read_parts         read one of each
tuning             the arguments of Tuning that they ask for
count_steps        steps of a run
warmup_steps       steps in which the rates rise
Walk               places of a run, each a row
plan_walk          those of a run that begins or goes on
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
Mask               what packed rows are masked by
Precision          what weights are held in, and products computed in
row_mask           choose it for a device
computed_in        have a forward computed in the precision of a run
StepBatches        one rank's share of one step
to_device          move it to the device
equal_numbers      as many batches on every rank
seed_step          seed what the model draws in a step
summed_loss        summed cross entropy of a batch
train_step         forward, backward, checks and the optimiser
StepResult         what a step came to
mean_loss          loss of validation data
TreeCollate        samples of a step to trees: a prompt once, two answers behind it
place_trees        move trees to the device, with their masks
read_loss          read a loss of preference: dpo, ipo, hinge, simpo, orpo, kto, mpo
Objective          summed loss of a batch of trees, held against a reference
answer_log_probs   summed log-probability of each answer of a batch
Figures            rewards and log-probabilities since the last report
keep_log_probs     compute a reference once, and keep it in a file
Distillation       summed loss of a batch, held against a teacher's predictions
DistillationLoss   how it is made
read_distillation_loss  read it: forward_kl, reverse_kl, jsd
check_teacher      refuse one that reads other tokens or pixels
Prompts            the prompts of a data set
Sampler            gives answers to prompts, groups from one reading
answered           sample of a prompt with an answer
GroupCollate       prompts with their answers to trees
advantages         what each answer is worth beside the others of its group
answering          have a model in training generate, and leave no trace of it
can_teach          whether the answers of a step give gradients
is_counted         whether a prompt counts
write_answers      write the answers of a step and their rewards
PolicyFigures      means and largest values since the last report
PolicyLoss         how the loss of an answer is made
read_policy_loss   read it: grpo, dr_grpo, dapo, gspo
PolicyObjective    summed loss of a batch of such trees
Reward             what a reward is called with
exact_match        reward of the answer that stands in the row
pattern            reward of a regular expression
json_form          reward of JSON with these keys
box_iou            reward of a box by its overlap
length             reward of a number of words
WithReference      a data set with what was kept
shard_again        shard what a forward without a backward has left whole
Key                which sample, in which pass
GradientCheck      every trained part has gradients, every frozen part none
Throughput         speed, memory and waiting time
save_step          write a checkpoint
last_checkpoint    the one to go on from
read_identity      what its run depends on
load_step          go on from it
named_checkpoint   a checkpoint by its name
load_weights       its weights alone
set_aside          rename all there are, to begin anew
gather_weights     copy all weights to the first rank
save_model         write a folder for transformers, adapters merged
save_adapter       write a folder for PEFT
StopRequest        notes SIGTERM
Stopped            a run that SIGTERM has ended
in_one_line        call a recipe, and say in one line what went wrong
"""

from torchtune_qwen25vl.training._answering import answering
from torchtune_qwen25vl.training._batches import (
    Mask,
    StepBatches,
    StepCollate,
    equal_numbers,
    row_mask,
    to_device,
)
from torchtune_qwen25vl.training._distill_settings import DistillSettings
from torchtune_qwen25vl.training._distillation import (
    Distillation,
    DistillationLoss,
    check_teacher,
    read_distillation_loss,
)
from torchtune_qwen25vl.training._ends import Stopped, StopRequest, in_one_line
from torchtune_qwen25vl.training._model import gather_weights, make_model, save_adapter, save_model
from torchtune_qwen25vl.training._muon import MuonAdamW
from torchtune_qwen25vl.training._objective import Figures, Objective, answer_log_probs
from torchtune_qwen25vl.training._parts import (
    GradientCheck,
    Part,
    parameter_groups,
    read_parts,
    trained_names,
    tuning,
)
from torchtune_qwen25vl.training._plan import count_steps, describe, warmup_steps
from torchtune_qwen25vl.training._policy import PolicyLoss, advantages, can_teach, read_policy_loss
from torchtune_qwen25vl.training._policy_objective import PolicyFigures, PolicyObjective
from torchtune_qwen25vl.training._policy_settings import PolicySettings
from torchtune_qwen25vl.training._precision import Precision, computed_in
from torchtune_qwen25vl.training._preference import read_loss
from torchtune_qwen25vl.training._preference_settings import PreferenceSettings
from torchtune_qwen25vl.training._recipe import Recipe, run
from torchtune_qwen25vl.training._recipes import SETTINGS
from torchtune_qwen25vl.training._reference import WithReference, keep_log_probs, shard_again
from torchtune_qwen25vl.training._rewards import (
    Reward,
    box_iou,
    exact_match,
    json_form,
    length,
    pattern,
)
from torchtune_qwen25vl.training._rollouts import (
    GroupCollate,
    Prompts,
    Sampler,
    answered,
    is_counted,
    write_answers,
)
from torchtune_qwen25vl.training._samples import (
    Key,
    Share,
    TrainSampler,
    ValidationSampler,
    make_loader,
    seed_step,
)
from torchtune_qwen25vl.training._settings import Settings, read_settings
from torchtune_qwen25vl.training._state import (
    last_checkpoint,
    load_step,
    load_weights,
    named_checkpoint,
    read_identity,
    save_step,
    set_aside,
)
from torchtune_qwen25vl.training._step import StepResult, mean_loss, summed_loss, train_step
from torchtune_qwen25vl.training._stochastic import StochasticAdamW
from torchtune_qwen25vl.training._throughput import Throughput
from torchtune_qwen25vl.training._tree_recipe import TreeRecipe
from torchtune_qwen25vl.training._trees import TreeCollate, place_trees
from torchtune_qwen25vl.training._walk import Walk, plan_walk

__all__ = [
    "SETTINGS",
    "DistillSettings",
    "Distillation",
    "DistillationLoss",
    "Figures",
    "GradientCheck",
    "GroupCollate",
    "Key",
    "Mask",
    "MuonAdamW",
    "Objective",
    "Part",
    "PolicyFigures",
    "PolicyLoss",
    "PolicyObjective",
    "PolicySettings",
    "Precision",
    "PreferenceSettings",
    "Prompts",
    "Recipe",
    "Reward",
    "Sampler",
    "Settings",
    "Share",
    "StepBatches",
    "StepCollate",
    "StepResult",
    "StochasticAdamW",
    "StopRequest",
    "Stopped",
    "Throughput",
    "TrainSampler",
    "TreeCollate",
    "TreeRecipe",
    "ValidationSampler",
    "Walk",
    "WithReference",
    "advantages",
    "answer_log_probs",
    "answered",
    "answering",
    "box_iou",
    "can_teach",
    "check_teacher",
    "computed_in",
    "count_steps",
    "describe",
    "equal_numbers",
    "exact_match",
    "gather_weights",
    "in_one_line",
    "is_counted",
    "json_form",
    "keep_log_probs",
    "last_checkpoint",
    "length",
    "load_step",
    "load_weights",
    "make_loader",
    "make_model",
    "mean_loss",
    "named_checkpoint",
    "parameter_groups",
    "pattern",
    "place_trees",
    "plan_walk",
    "read_distillation_loss",
    "read_identity",
    "read_loss",
    "read_parts",
    "read_policy_loss",
    "read_settings",
    "row_mask",
    "run",
    "save_adapter",
    "save_model",
    "save_step",
    "seed_step",
    "set_aside",
    "shard_again",
    "summed_loss",
    "to_device",
    "train_step",
    "trained_names",
    "tuning",
    "warmup_steps",
    "write_answers",
]
