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
embed_batches          embed the prompts of this rank
Record                 how one prompt ended
STATES                 how a prompt can end
records_of             how every prompt ended
digest                 names a prompt and its images
finish                 say how the run ended

and of `recipes/image.py`:

ImageSettings          its keys
path_of                the file of a prompt's embeddings
read_size              width and height by aspect ratio
sized                  a size of a shape and an area
Memory                 what drawing takes of memory
Canvas                 how large an image is drawn
write_image            an image to a file that says what it was drawn from
write_sheet            all images on one page
Drawn                  one of them
"""

from torchtune_qwen25vl.conditioning._checked import CheckedEncoder, check_encoder
from torchtune_qwen25vl.conditioning._diffusers import DiffusersTextEncoder
from torchtune_qwen25vl.conditioning._embedding import embed_batches
from torchtune_qwen25vl.conditioning._encoder import PromptEncoder, padded
from torchtune_qwen25vl.conditioning._find import TextEncoderFile, find_text_encoders
from torchtune_qwen25vl.conditioning._image_settings import ImageSettings
from torchtune_qwen25vl.conditioning._load import load_text_encoder
from torchtune_qwen25vl.conditioning._prompts import PromptSample, prompt_sample
from torchtune_qwen25vl.conditioning._run import (
    STATES,
    Plan,
    Record,
    digest,
    finish,
    path_of,
    plan_run,
    records_of,
    show_plan,
)
from torchtune_qwen25vl.conditioning._settings import Settings
from torchtune_qwen25vl.conditioning._sheet import Drawn, write_image, write_sheet
from torchtune_qwen25vl.conditioning._sizes import Canvas, Memory, read_size
from torchtune_qwen25vl.conditioning._store import StoredEmbeds, read_embeds, write_embeds
from torchtune_qwen25vl.conditioning._templates import Task, sized

__all__ = [
    "STATES",
    "Canvas",
    "CheckedEncoder",
    "DiffusersTextEncoder",
    "Drawn",
    "ImageSettings",
    "Memory",
    "Plan",
    "PromptEncoder",
    "PromptSample",
    "Record",
    "Settings",
    "StoredEmbeds",
    "Task",
    "TextEncoderFile",
    "check_encoder",
    "digest",
    "embed_batches",
    "find_text_encoders",
    "finish",
    "load_text_encoder",
    "padded",
    "path_of",
    "plan_run",
    "prompt_sample",
    "read_embeds",
    "read_size",
    "records_of",
    "show_plan",
    "sized",
    "write_embeds",
    "write_image",
    "write_sheet",
]
