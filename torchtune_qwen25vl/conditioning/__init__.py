"""Prompts to embeddings for Qwen-Image, as its pipelines take them.

PromptEncoder          prompts, with images to edit, to embeddings
prompt_sample          one prompt to the sample that it embeds
PromptSample           that sample
padded                 embeddings of prompts to a batch and its mask
DiffusersTextEncoder   the model as `text_encoder=` of diffusers' Qwen-Image pipelines
Task                   what an image is asked for: the three templates
"""

from torchtune_qwen25vl.conditioning._diffusers import DiffusersTextEncoder
from torchtune_qwen25vl.conditioning._encoder import PromptEncoder, padded
from torchtune_qwen25vl.conditioning._prompts import PromptSample, prompt_sample
from torchtune_qwen25vl.conditioning._templates import Task

__all__ = [
    "DiffusersTextEncoder",
    "PromptEncoder",
    "PromptSample",
    "Task",
    "padded",
    "prompt_sample",
]
