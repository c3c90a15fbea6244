"""Prompt embeddings: the text encoder of Qwen-Image, against diffusers' own `encode_prompt`.

Shapes: b prompts, l tokens of the longest, d width.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from parity import photos, reference, vocabulary
from parity.stages._stage import Measurement, Setting, Stage, max_error, refused
from torchtune_qwen25vl import Qwen25VLTransform
from torchtune_qwen25vl.conditioning import DiffusersTextEncoder, PromptEncoder
from torchtune_qwen25vl.weights import find_weights

MODEL = "tiny, Qwen's ids"
LIMITS: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 12845056}
PROMPTS = (
    'A coffee shop entrance with a chalkboard sign that reads "Qwen Coffee", ultra HD, 4K.',
    "\n\nTwo line breaks first.",
    "猫が窓辺で寝ている。 ☕",
    "",
)
NAMES = ("Write <|im_end|> on a wall.", "<|im_start|>assistant\n<|vision_end|>")
EDITS = ("Make the sky green.", "\nReplace the cat with a very small dog in a red coat.")


@functools.cache
def transforms(folder: Path, checkpoint: bool) -> tuple[Qwen25VLTransform, Any]:
    """Our transform and their processor, with the same tokenizer and pixel limits."""
    if not checkpoint:
        return Qwen25VLTransform(folder / "tokenizer.json", **LIMITS), reference.processor(
            folder, **LIMITS
        )
    ours = Qwen25VLTransform.from_folder(folder)
    limits = {"min_pixels": ours.min_pixels, "max_pixels": ours.max_pixels}
    return ours, reference.processor(folder, **limits)


class Pair:
    """Our encoder, and their pipelines around their model and around our drop-in."""

    def __init__(self, setting: Setting) -> None:
        name, self.setting = setting.checkpoint or MODEL, setting
        folder = find_weights(name)[0] if setting.checkpoint else vocabulary.real()
        transform, self.processor = transforms(folder, bool(setting.checkpoint))
        theirs = reference.model(name, setting.device)
        ours = setting.ours_like(theirs)
        self.encoder = PromptEncoder(ours, transform)
        self._typed = reference.TypedTextEncoder(theirs)
        self._untyped, self._ours = theirs, ours

    def theirs(self, task: str) -> Any:
        """Their pipeline, their model being told the types of tokens."""
        return reference.pipeline(task, self._typed, self.processor)

    def untyped(self, task: str) -> Any:
        """Their pipeline as it is."""
        return reference.pipeline(task, self._untyped, self.processor)

    def drop_in(self, task: str, **options: Any) -> Any:
        """Their pipeline around our model."""
        text_encoder = DiffusersTextEncoder(self._ours, **options)
        return reference.pipeline(task, text_encoder, self.processor)


def measure(setting: Setting) -> Iterator[Measurement]:
    """Every task: alone, in batches, with several images; our encoder, then the drop-in."""
    pair = Pair(setting)
    try:
        reference.ask(pair.theirs, "text_to_image")
    except reference.RefusalError as refusal:  # no diffusers goes with an old transformers
        yield refused("every task", refusal)
        return
    yield from _texts(pair)
    yield from _images(pair, "edit", _pictures((90, 200), (148, 84)), small=setting.small)
    yield from _images(pair, "edit_plus", _pictures((112, 60), (57, 145)), small=setting.small)
    yield from _drop_in(pair)


def _texts(pair: Pair) -> Iterator[Measurement]:
    theirs = pair.theirs("text_to_image")
    right = reference.prompt_embeds(theirs, PROMPTS)
    yield _compared("texts", pair.encoder(PROMPTS), right)
    right = reference.prompt_embeds(theirs, PROMPTS, max_sequence_length=5)
    yield _compared("texts, 5 tokens", pair.encoder(PROMPTS, max_sequence_length=5), right)
    right = reference.prompt_embeds(theirs, NAMES)
    yield _compared("names of tokens", pair.encoder(NAMES, compat="diffusers"), right)


def _images(
    pair: Pair, task: Any, images: Sequence[Image.Image], *, small: bool
) -> Iterator[Measurement]:
    """Each prompt alone is theirs; ours has both in one call, with different images."""
    theirs = pair.theirs(task)
    each = [images[:1], images[1:]] if task == "edit" else [images, images[1:]]
    right = [
        reference.prompt_embeds(theirs, [text], of_text)
        for text, of_text in zip(EDITS, each, strict=True)
    ]
    embeds, mask = pair.encoder(EDITS, each, task=task, resize=False)
    for row, (expected, expected_mask) in enumerate(right):
        length = expected_mask.shape[1]
        behind = float(embeds[row, length:].abs().sum() + mask[row, length:].sum())
        found = embeds[row : row + 1, :length], mask[row : row + 1, :length]
        yield _compared(f"{task}, row {row} of two", found, (expected, expected_mask), behind)
    if task == "edit_plus":
        right_alone = reference.prompt_embeds(theirs, EDITS)
        yield _compared("edit_plus without images", pair.encoder(EDITS, task=task), right_alone)
    if task == "edit_plus" or not small:  # an image of 1024 * 1024 takes a while
        whole = [reference.condition_image(theirs, task, image) for image in images[:1]]
        right_whole = reference.prompt_embeds(theirs, EDITS[:1], whole)
        yield _compared(
            f"{task}, resized", pair.encoder(EDITS[0], images[:1], task=task), right_whole
        )


def _drop_in(pair: Pair) -> Iterator[Measurement]:
    """Our model in their pipelines; and what these make of theirs without types of tokens."""
    images = _pictures((84, 140))
    for task, texts, media in (
        ("text_to_image", PROMPTS, []),
        ("edit", EDITS[:1], images),
        ("edit_plus", EDITS[1:], images * 2),
    ):
        right = reference.prompt_embeds(pair.theirs(task), texts, media)
        found = reference.prompt_embeds(pair.drop_in(task), texts, media)
        yield _compared(f"{task}, in the pipeline", found, right)
    if not reference.VERSION.startswith("4."):
        right = reference.prompt_embeds(pair.untyped("edit"), EDITS[:1], images)
        found = reference.prompt_embeds(
            pair.drop_in("edit", compat="diffusers-1d"), EDITS[:1], images
        )
        yield _compared("edit, as the pipeline alone", found, right)


def _pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Images of these widths and heights."""
    return [photos.noise(*size, seed=seed) for seed, size in enumerate(sizes)]


def _compared(
    case: str,
    ours: tuple[Tensor, Tensor],
    theirs: tuple[Tensor, Tensor],
    behind: float = 0.0,
) -> Measurement:
    """Embeddings element by element, and the mask, which must be equal."""
    embeds, expected = ours[0].cpu(), theirs[0].cpu()
    is_same = torch.equal(ours[1].cpu(), theirs[1].cpu())
    error = max_error(embeds, expected) + behind if is_same else float("inf")
    return Measurement(case, error, 3e-5 * max(1.0, float(expected.abs().max())))


PROMPT_EMBEDDINGS = Stage(
    name="prompt embeddings",
    what="Qwen-Image's text encoder: three tasks, batches, images, in diffusers' pipelines",
    tolerance="3e-5 * max(1, absmax): the layers' own errors behind all of them, as for logits",
    fault="prompts on one axis",
    measure=measure,
)
