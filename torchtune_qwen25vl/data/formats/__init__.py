"""One module for each public format: its rows' parser beside the builder that a YAML names."""

from torchtune_qwen25vl.data.formats._captions import caption_dataset, caption_folder_dataset
from torchtune_qwen25vl.data.formats._coco import coco_caption_dataset
from torchtune_qwen25vl.data.formats._hf import hf_dataset
from torchtune_qwen25vl.data.formats._llava import llava_dataset
from torchtune_qwen25vl.data.formats._openai import openai_dataset
from torchtune_qwen25vl.data.formats._preference import (
    hf_preference_dataset,
    preference_dataset,
    sharegpt_preference_dataset,
    swift_preference_dataset,
)
from torchtune_qwen25vl.data.formats._queries import alpaca_dataset
from torchtune_qwen25vl.data.formats._sharegpt import sharegpt_dataset
from torchtune_qwen25vl.data.formats._swift import swift_dataset

__all__ = [
    "alpaca_dataset",
    "caption_dataset",
    "caption_folder_dataset",
    "coco_caption_dataset",
    "hf_dataset",
    "hf_preference_dataset",
    "llava_dataset",
    "openai_dataset",
    "preference_dataset",
    "sharegpt_dataset",
    "sharegpt_preference_dataset",
    "swift_dataset",
    "swift_preference_dataset",
]
