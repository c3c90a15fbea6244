"""COCO's captions: a file of images and annotations, each annotation a row."""

import json
from pathlib import Path
from typing import Any

from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data.formats._captions import PROMPT, SHOWN_FIRST, CaptionParser
from torchtune_qwen25vl.data.formats._shared import refuse_option
from torchtune_qwen25vl.media import JsonRows, json_texts, numbers_of_split, read_content
from torchtune_qwen25vl.transform import Qwen25VLTransform


def coco_rows(source: str, split: str | None = None) -> JsonRows:
    """Return the rows of COCO's `captions_*.json`, one for each annotation, in the file's order.

    Args:
        source: the file
        split: part of its images, such as train[:95%], so that no two parts share one

    Raises:
        ValueError: if the file has no images and annotations, or an annotation has no image.
    """
    content = json.loads(read_content(Path(source)))
    if not isinstance(content, dict) or not {"images", "annotations"} <= set(content):
        raise ValueError(f"{source}: COCO captions hold 'images' and 'annotations'")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    if strays := [note["id"] for note in content["annotations"] if note["image_id"] not in names]:
        raise ValueError(f"{source}: annotations {strays[:5]} belong to none of its images")
    images = content["images"]
    chosen = {images[k]["id"] for k in numbers_of_split(source, split, len(images))}
    rows = [
        {"image": names[note["image_id"]], "caption": note["caption"]}
        for note in content["annotations"]
        if note["image_id"] in chosen
    ]
    return JsonRows(json_texts(rows))


def coco_caption_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    prompt: str = PROMPT,
    split: str | None = None,
    **options: Any,
) -> SampleDataset:
    """Build a dataset of COCO's captions, a sample for each annotation.

    Args:
        model_transform: tokenizer of the recipe
        source: `captions_*.json`; `media_root` is the folder of its images
        prompt: question of the user, after the image
        split: part of the images in the file's order, such as train[:95%]
        **options: `Options`

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    refuse_option(options, "prepend_media", SHOWN_FIRST)
    rows, parse = coco_rows(source, split), CaptionParser(prompt)
    return sample_dataset(model_transform, rows, parse, source=source, split=split, **options)
