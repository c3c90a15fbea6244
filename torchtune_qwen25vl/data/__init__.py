"""Datasets of the public formats, for recipes and for the check command.

Builder                   a row
`llava_dataset`           conversations of from/value, beside image or video (LLaVA, QwenLM)
`sharegpt_dataset`        the same beside images and videos; columns and tags (LLaMA-Factory)
`swift_dataset`           messages of role/content beside images, videos, objects; or query and
                          response, with history (ms-swift)
`alpaca_dataset`          instruction, input and output, with history, beside images (alpaca)
`openai_dataset`          messages of content parts that hold their media (OpenAI, Qwen)
`hf_dataset`              messages, or prompt and completion, beside image columns (TRL, the hub)
`caption_dataset`         an image and a caption or several: CSV, TSV, JSON, image columns
`coco_caption_dataset`    COCO's captions_*.json
`caption_folder_dataset`  a folder of images with .txt sidecars

Of preference, a chosen and a rejected answer, or one that was liked or not:

`preference_dataset`           texts: prompt, chosen, rejected beside image (2U1, RLAIF-V, plain)
`hf_preference_dataset`        messages or texts of these names beside image columns (TRL)
`sharegpt_preference_dataset`  conversations, chosen, rejected or kto_tag (LLaMA-Factory)
`swift_preference_dataset`     messages, rejected_response, rejected_images or label (ms-swift)

`mixture` joins any of them, of each so many rows in a pass. It builds a `Mixture`, whose rows are
a `JoinedDataset`; `AMOUNT` are the keys that say how many, `parts_in` finds its sections.

`scale_box` moves a box from an image to its resized copy, `first_box` reads the one in an answer,
`overlap` is how much two of them share; `normalised` is a text without what makes no difference.

`Options` are the arguments that all builders have in common, `SampleDataset` is what they build.

`python -m torchtune_qwen25vl.data check CONFIG` reads a whole set before it is trained on.
"""

from torchtune_qwen25vl.data._answers import normalised
from torchtune_qwen25vl.data._boxes import first_box, overlap, scale_box
from torchtune_qwen25vl.data._dataset import SampleDataset
from torchtune_qwen25vl.data._mixture import AMOUNT, JoinedDataset, Mixture, mixture, parts_in
from torchtune_qwen25vl.data._options import Options
from torchtune_qwen25vl.data.formats import (
    alpaca_dataset,
    caption_dataset,
    caption_folder_dataset,
    coco_caption_dataset,
    hf_dataset,
    hf_preference_dataset,
    llava_dataset,
    openai_dataset,
    preference_dataset,
    sharegpt_dataset,
    sharegpt_preference_dataset,
    swift_dataset,
    swift_preference_dataset,
)

__all__ = [
    "AMOUNT",
    "JoinedDataset",
    "Mixture",
    "Options",
    "SampleDataset",
    "alpaca_dataset",
    "caption_dataset",
    "caption_folder_dataset",
    "coco_caption_dataset",
    "first_box",
    "hf_dataset",
    "hf_preference_dataset",
    "llava_dataset",
    "mixture",
    "normalised",
    "openai_dataset",
    "overlap",
    "parts_in",
    "preference_dataset",
    "scale_box",
    "sharegpt_dataset",
    "sharegpt_preference_dataset",
    "swift_dataset",
    "swift_preference_dataset",
]
