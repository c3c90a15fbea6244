"""Prompts and images to samples of tokens that say where the template's own part ends."""

from collections.abc import Sequence
from itertools import count
from typing import Any, Literal, NamedTuple

from PIL import Image

from torchtune_qwen25vl.conditioning._templates import Task, Template, template_of
from torchtune_qwen25vl.transform import Qwen25VLTransform

Compat = Literal["qwen", "diffusers"]
HEADER = "user\n"
MOST_TOKENS = 1024  # of a prompt without images; diffusers cuts what is longer


class PromptSample(NamedTuple):
    """A sample of the transform, and the part of its tokens that conditions an image."""

    sample: dict[str, Any]
    start: int  # tokens before it, the template's own
    end: int


def prompt_sample(
    transform: Qwen25VLTransform,
    prompt: str,
    images: Sequence[Image.Image] = (),
    *,
    task: Task = "text_to_image",
    resize: bool = True,
    max_sequence_length: int | None = None,
    compat: Compat = "qwen",
) -> PromptSample:
    """Make the sample of one prompt; the arguments are those of `PromptEncoder`.

    Raises:
        ValueError: if the task is none, or takes another number of images, an image is none or
            cannot be resized, or `max_sequence_length` is not positive.
    """
    template = template_of(task)
    _check(template, task, prompt, images, max_sequence_length, compat)
    if resize:
        images = [template.resized(image) for image in images]
    messages = template.messages(prompt, images, markup=compat == "diffusers")
    sample = transform({"messages": messages}, inference=True)
    tokens = sample["tokens"].tolist()
    start, end = _start(transform, tokens), len(tokens)
    if max_sequence_length is not None:
        end = min(end, start + max_sequence_length)
    if compat == "diffusers" and task == "text_to_image":
        end = min(end, start + MOST_TOKENS)
    return PromptSample(sample, start, end)


def _start(transform: Qwen25VLTransform, tokens: Sequence[int]) -> int:
    """Return the number of tokens up to the end of the user's header.

    A line break at the beginning of a prompt may stand in one token with that of the header; it is
    left out with it, as by diffusers, whose numbers of tokens (34 and 64) are these in Qwen's
    vocabulary. ComfyUI keeps the header in such a case.
    """
    im_start = transform.special_tokens["<|im_start|>"]
    header = tokens.index(im_start, tokens.index(im_start) + 1) + 1
    length = next(
        n for n in count(1) if transform.decode(tokens[header : header + n]).startswith(HEADER)
    )
    return header + length


def _check(
    template: Template,
    task: Task,
    prompt: Any,
    images: Sequence[Any],
    max_sequence_length: int | None,
    compat: str,
) -> None:
    if not isinstance(prompt, str):
        raise ValueError(f"a prompt is a text, got {type(prompt).__name__}")
    if compat not in ("qwen", "diffusers"):
        raise ValueError(f"compat is 'qwen' or 'diffusers', got {compat!r}")
    if max_sequence_length is not None and max_sequence_length < 1:
        raise ValueError(
            f"max_sequence_length is a number of tokens from 1 on, got {max_sequence_length}"
        )
    least, most = template.images
    if len(images) < least or (most is not None and len(images) > most):
        wanted = f"{least} image" if most == 1 else "no images"
        raise ValueError(
            f"{task} takes {wanted} for each prompt, got {len(images)}; edit takes one, and "
            "edit_plus any number"
        )
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(f"an image is a PIL image, got {type(image).__name__}")
