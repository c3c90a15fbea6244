"""Prompts to embeddings for Qwen-Image, as its pipelines take them.

load_text_encoder      from folders, hub ids, single files in any form, GGUF
find_text_encoders     which files and folders are some
TextEncoderFile        what one of them is
PromptEncoder          prompts, with images to edit, to embeddings
prompt_sample          one prompt to the sample that it embeds
PromptSample           that sample
padded                 embeddings of prompts to a batch and its mask
DiffusersTextEncoder   the model as `text_encoder=` of diffusers' Qwen-Image pipelines
Task                   what an image is asked for: the three templates
"""

from torchtune_qwen25vl.conditioning._diffusers import DiffusersTextEncoder
from torchtune_qwen25vl.conditioning._encoder import PromptEncoder, padded
from torchtune_qwen25vl.conditioning._find import TextEncoderFile, find_text_encoders
from torchtune_qwen25vl.conditioning._load import load_text_encoder
from torchtune_qwen25vl.conditioning._prompts import PromptSample, prompt_sample
from torchtune_qwen25vl.conditioning._templates import Task

__all__ = [
    "DiffusersTextEncoder",
    "PromptEncoder",
    "PromptSample",
    "Task",
    "TextEncoderFile",
    "find_text_encoders",
    "load_text_encoder",
    "padded",
    "prompt_sample",
]
