"""Prompts to embeddings for Qwen-Image, as its pipelines take them.

load_text_encoder      from folders, hub ids, single files in any form, GGUF
find_text_encoders     which files and folders are some
TextEncoderFile        what one of them is
PromptEncoder          prompts, with images to edit, to embeddings
prompt_sample          one prompt to the sample that it embeds
PromptSample           that sample
padded                 embeddings of prompts to a batch and its mask
write_embeds           embeddings of a prompt to a file
read_embeds            and back
StoredEmbeds           what that returns
DiffusersTextEncoder   the model as `text_encoder=` of diffusers' Qwen-Image pipelines
Task                   what an image is asked for: the three templates

Parts of `recipes/embed_prompts.py`:

Settings               its keys
check_encoder          fetch an encoder and check it; no weights are read
CheckedEncoder         one that can be loaded
plan_run               what is to be done, from what is on disk
Plan                   what all ranks have to know of it
show_plan              what would be done
Prompter               rows to samples
Embedder               samples to embeddings, whatever the memory
Record                 how one prompt ended
STATES                 how a prompt can end
write_down             files of a batch, and its records
finish                 say how the run ended
"""

from torchtune_qwen25vl.conditioning._batches import Embedder, Prompter
from torchtune_qwen25vl.conditioning._checked import CheckedEncoder, check_encoder
from torchtune_qwen25vl.conditioning._diffusers import DiffusersTextEncoder
from torchtune_qwen25vl.conditioning._encoder import PromptEncoder, padded
from torchtune_qwen25vl.conditioning._find import TextEncoderFile, find_text_encoders
from torchtune_qwen25vl.conditioning._load import load_text_encoder
from torchtune_qwen25vl.conditioning._prompts import PromptSample, prompt_sample
from torchtune_qwen25vl.conditioning._run import (
    STATES,
    Plan,
    Record,
    finish,
    plan_run,
    show_plan,
    write_down,
)
from torchtune_qwen25vl.conditioning._settings import Settings
from torchtune_qwen25vl.conditioning._store import StoredEmbeds, read_embeds, write_embeds
from torchtune_qwen25vl.conditioning._templates import Task

__all__ = [
    "STATES",
    "CheckedEncoder",
    "DiffusersTextEncoder",
    "Embedder",
    "Plan",
    "PromptEncoder",
    "PromptSample",
    "Prompter",
    "Record",
    "Settings",
    "StoredEmbeds",
    "Task",
    "TextEncoderFile",
    "check_encoder",
    "find_text_encoders",
    "finish",
    "load_text_encoder",
    "padded",
    "plan_run",
    "prompt_sample",
    "read_embeds",
    "show_plan",
    "write_down",
    "write_embeds",
]
