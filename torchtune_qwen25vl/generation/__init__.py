"""Tokens after a prompt.

inference_batch         conversations to the left-padded batch that is continued
prompt_batch            samples to that batch
generate                continue every row of a batch
Generation              what it returns
evaluating              put a model into evaluation mode for a while, without gradients
next_log_probs          how likely each token is to come next
PromptedModel           the model as torchtune's generation loop calls one
RunningBatch            rows that are continued together, and come and go
Prompt                  what enters it
Ended                   what leaves it
Sampling                how a token is chosen
check_options           refuse options out of range
read_generation_config  a checkpoint's own way to choose tokens
NotFiniteError          logits are nan or infinite
"""

from torchtune_qwen25vl.generation._batch import inference_batch, prompt_batch
from torchtune_qwen25vl.generation._defaults import read_generation_config
from torchtune_qwen25vl.generation._generate import (
    Generation,
    PromptedModel,
    evaluating,
    generate,
    next_log_probs,
)
from torchtune_qwen25vl.generation._running import Ended, Prompt, RunningBatch
from torchtune_qwen25vl.generation._sampling import NotFiniteError, Sampling, check_options

__all__ = [
    "Ended",
    "Generation",
    "NotFiniteError",
    "Prompt",
    "PromptedModel",
    "RunningBatch",
    "Sampling",
    "check_options",
    "evaluating",
    "generate",
    "inference_batch",
    "next_log_probs",
    "prompt_batch",
    "read_generation_config",
]
