"""Datasets of the public formats, for recipes and for the check command.

Builder                   a row
`llava_dataset`           conversations of from/value, beside image or video (LLaVA, QwenLM)
`sharegpt_dataset`        the same beside images and videos; columns and tags (LLaMA-Factory)
`swift_dataset`           messages of role/content beside images, videos, objects (ms-swift)
`openai_dataset`          messages of content parts that hold their media (OpenAI, Qwen)
`hf_dataset`              messages, or prompt and completion, beside image columns (TRL, the hub)
`caption_dataset`         an image and a caption or several: CSV, TSV, JSON, image columns
`coco_caption_dataset`    COCO's captions_*.json
`caption_folder_dataset`  a folder of images with .txt sidecars

`Options` are the arguments that all builders have in common, `SampleDataset` is what they build.

`python -m torchtune_qwen25vl.data check CONFIG` reads a whole set before it is trained on.
"""

from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data._options import Options
from torchtune_qwen25vl.data.formats import (
    caption_dataset,
    caption_folder_dataset,
    coco_caption_dataset,
    hf_dataset,
    llava_dataset,
    openai_dataset,
    sharegpt_dataset,
    swift_dataset,
)

__all__ = [
    "Options",
    "SampleDataset",
    "caption_dataset",
    "caption_folder_dataset",
    "coco_caption_dataset",
    "hf_dataset",
    "llava_dataset",
    "openai_dataset",
    "sharegpt_dataset",
    "swift_dataset",
]
