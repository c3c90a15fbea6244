"""Dataset builders, one for each format: what a recipe's `dataset._component_` names.

All are called as torchtune calls its own, ``builder(tokenizer, source=..., ...)``. By name they
take `Options`, and, where the source is not a file, what ``datasets.load_dataset`` takes.

The source says where rows are stored (see `open_rows`), the builder how one is laid out.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torchtune_qwen25vl.data._captions import (
    PROMPT,
    CaptionParser,
    CaptionRows,
    FolderRows,
    coco_rows,
)
from torchtune_qwen25vl.data._conversation import Conversation
from torchtune_qwen25vl.data._dataset import SampleDataset, sample_dataset
from torchtune_qwen25vl.data._llava import parse_llava
from torchtune_qwen25vl.data._options import OPTIONS
from torchtune_qwen25vl.data._parts import parse_hf, parse_openai
from torchtune_qwen25vl.data._sharegpt import sharegpt_parser, swift_parser
from torchtune_qwen25vl.media import Rows, open_rows
from torchtune_qwen25vl.transform import Qwen25VLTransform


def llava_dataset(
    model_transform: Qwen25VLTransform, *, source: str, **options: Any
) -> SampleDataset:
    """LLaVA's and QwenLM's conversations of "from" and "value", with "image" or "video".

    Args:
        model_transform: the recipe's tokenizer.
        source: a .json or .jsonl file, or another that `open_rows` takes.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _conversations(model_transform, source, parse_llava, options)


def sharegpt_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """ShareGPT's conversations beside "images" and "videos", named as LLaMA-Factory names them.

    Args:
        model_transform: the recipe's tokenizer.
        source: a .json or .jsonl file, or another that `open_rows` takes.
        columns: as in `dataset_info.json`: where "messages", "images", "videos", "system", "tools"
            and "objects" are. Messages are in "conversations" by default.
        tags: as in `dataset_info.json`: `role_tag`, `content_tag`, `user_tag`, `assistant_tag`,
            `observation_tag`, `function_tag`, `system_tag`.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _conversations(model_transform, source, sharegpt_parser(columns, tags), options)


def swift_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> SampleDataset:
    """ms-swift's standard rows: "messages" beside "images", "videos", "objects" and "tools".

    Args:
        model_transform: the recipe's tokenizer.
        source: a .jsonl or .json file, or another that `open_rows` takes.
        columns: where these columns are, if under other names.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _conversations(model_transform, source, swift_parser(columns), options)


def openai_dataset(
    model_transform: Qwen25VLTransform, *, source: str, **options: Any
) -> SampleDataset:
    """OpenAI's and Qwen's messages of content parts, each image or video in its own part.

    Args:
        model_transform: the recipe's tokenizer.
        source: a .jsonl or .json file, or another that `open_rows` takes.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _conversations(model_transform, source, parse_openai, options)


def hf_dataset(model_transform: Qwen25VLTransform, *, source: str, **options: Any) -> SampleDataset:
    """HF datasets with image columns: "messages", or "prompt" and "completion", as TRL takes them.

    Args:
        model_transform: the recipe's tokenizer.
        source: a folder of ``save_to_disk``, a .parquet file, a hub id, or another that `open_rows`
            takes.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    return _conversations(model_transform, source, parse_hf, options)


def caption_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    image_column: str = "image",
    caption_column: str = "caption",
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """Pictures with a caption, or a list of captions each of which is a sample, in a table or list.

    Args:
        model_transform: the recipe's tokenizer.
        source: a .csv or .tsv file with a header, a .jsonl or .json file, or another that
            `open_rows` takes.
        image_column: where the pictures are.
        caption_column: where the captions are.
        prompt: what the user asks, after the picture.
        **options: `Options`, and arguments of ``datasets.load_dataset``.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    rows, common = _opened(source, options)
    parse = CaptionParser(prompt, image_column, caption_column)
    rows = CaptionRows(rows, caption_column)
    return sample_dataset(model_transform, rows, parse, source=source, **common)


def coco_caption_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """COCO's captions: a sample for each annotation.

    Args:
        model_transform: the recipe's tokenizer.
        source: `captions_*.json`; `media_root` is the folder of its pictures.
        prompt: what the user asks, after the picture.
        **options: `Options`.

    Raises:
        ValueError: if the source or an option cannot be; a bad row raises when it is read.
    """
    rows, parse = coco_rows(source), CaptionParser(prompt)
    return sample_dataset(model_transform, rows, parse, source=source, **options)


def caption_folder_dataset(
    model_transform: Qwen25VLTransform,
    *,
    source: str,
    prompt: str = PROMPT,
    **options: Any,
) -> SampleDataset:
    """A folder of pictures, subfolders included, with a .txt of the same name beside each.

    Args:
        model_transform: the recipe's tokenizer.
        source: the folder.
        prompt: what the user asks, after the picture.
        **options: `Options`.

    Raises:
        ValueError: if it holds no pictures or an option cannot be; a bad row raises when read.
    """
    rows, parse = FolderRows(source), CaptionParser(prompt)
    return sample_dataset(model_transform, rows, parse, source=source, **options)


def _conversations(
    model_transform: Qwen25VLTransform,
    source: str,
    parse: Callable[[dict[str, Any]], Conversation],
    options: Mapping[str, Any],
) -> SampleDataset:
    rows, common = _opened(source, options)
    return sample_dataset(model_transform, rows, parse, source=source, **common)


def _opened(source: str, options: Mapping[str, Any]) -> tuple[Rows, dict[str, Any]]:
    """The rows, and those of the options that are `Options`."""
    common = {name: value for name, value in options.items() if name in OPTIONS}
    others = {name: value for name, value in options.items() if name not in OPTIONS}
    return open_rows(source, **others), common
