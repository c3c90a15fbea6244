"""COCO's captions: a file of images and annotations, each annotation a row."""

import json
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data.formats._captions import PROMPT, SHOWN_FIRST, CaptionParser
from torchtune_qwen25vl.data.formats._shared import refuse_option
from torchtune_qwen25vl.media import JsonRows, json_texts
from torchtune_qwen25vl.transform import Qwen25VLTransform


def coco_rows(source: str) -> JsonRows:
    """Return the rows of COCO's `captions_*.json`, one for each annotation, in the file's order.

    Raises:
        ValueError: if the file has no images and annotations, or an annotation has no image.
    """
    content = json.loads(Path(source).read_text("utf-8"))
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"{source}: COCO captions hold 'images' and 'annotations'")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    if strays := [note["id"] for note in content["annotations"] if note["image_id"] not in names]:
        raise ValueError(f"{source}: annotations {strays[:5]} belong to none of its images")
    rows = [
        {"image": names[n["image_id"]], "caption": n["caption"]} for n in content["annotations"]
    ]
    return JsonRows(json_texts(rows))


def coco_caption_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of COCO's captions, a sample for each annotation.

    Args:
        model_transform: tokenizer of the recipe
        source: `captions_*.json`; `media_root` is the folder of its images
        prompt: question of the user, after the image
        **options: `Options`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    refuse_option(options, "prepend_media", SHOWN_FIRST)
    rows, parse = coco_rows(source), CaptionParser(prompt)
    return sample_dataset(model_transform, rows, parse, source=source, **options)
