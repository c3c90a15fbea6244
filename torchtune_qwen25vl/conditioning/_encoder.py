"""Prompts to embeddings: one forward over packed rows, without the output layer.

Shapes: b prompts, l tokens of the longest, d width of the decoder, n tokens.
"""

import gc
from collections.abc import Iterable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchtune_qwen25vl.conditioning._prompts import Compat, PromptSample, prompt_sample
from torchtune_qwen25vl.conditioning._templates import Task
from torchtune_qwen25vl.device import release_cache
from torchtune_qwen25vl.generation import evaluating
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import Qwen25VLTransform, batch_to_device, packed_collate

ROW_TOKENS = 4096  # of prompts that go through the model in one row; a longer one goes alone

Images = Sequence[Image.Image] | Sequence[Sequence[Image.Image] | Image.Image | None]


class PromptEncoder:
    """Qwen-Image's text encoder: prompts to the embeddings that its transformer takes.

    Args:
        model: Qwen25VL on its device
        transform: its own, with the pixel limits of its processor
    """

    def __init__(self, model: Qwen25VL, transform: Qwen25VLTransform) -> None:
        self.model, self.transform = model, transform

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings."""
        return self.model.dtype

    def __call__(
        self,
        prompts: str | Sequence[str],
        images: Image.Image | Images | None = None,
        *,
        task: Task = "text_to_image",
        resize: bool = True,
        max_sequence_length: int | None = None,
        compat: Compat = "qwen",
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts, each with the images that it is about.

        The embeddings are the hidden states of the last layer behind the final norm, from the
        user's text (and images) on to the end of the assistant's header. A name of one of Qwen's
        tokens in a prompt, such as `<|im_end|>`, is plain text.

        Args:
            prompts: one text or several
            images: a list of PIL images for each prompt, or for a single prompt the list itself
            task: "text_to_image" takes no images; "edit" one for each prompt; "edit_plus" any
                number (editions 2509 and 2511 of Qwen-Image-Edit)
            resize: bring images to the area of the task first, 1024 * 1024 pixels for "edit" and
                384 * 384 for "edit_plus", as the pipelines do; without it the processor gets them
                as they are
            max_sequence_length: tokens that are kept of each prompt; diffusers passes 512 by
                default, and cuts nothing where there are images
            compat: "diffusers" takes names of tokens in a prompt for these tokens and cuts a prompt
                without images after 1024, as diffusers' tokenizer does

        Returns:
            Embeddings [b, l, d] in the model's dtype, zero behind the end of a prompt; and their
            mask, int64 [b, l], 1 where there is a token.

        Raises:
            ValueError: if there are as many lists of images as prompts, the task takes another
                number of images, or a setting cannot be.

        Source: `encode_prompt` of diffusers 0.42.1 (pipelines/qwenimage), around transformers with
        `mm_token_type_ids`, without which transformers 5 computes other positions of images
        (huggingface/diffusers, issue 14194).
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts:
            raise ValueError("embeddings need at least one prompt, got none")
        samples = [
            prompt_sample(
                self.transform,
                text,
                of_text,
                task=task,
                resize=resize,
                max_sequence_length=max_sequence_length,
                compat=compat,
            )
            for text, of_text in zip(texts, _by_prompt(prompts, images, len(texts)), strict=True)
        ]
        return padded(self.embed(samples))

    def release(self) -> None:
        """Give back the memory of the weights, even if someone still holds the model."""
        device = self.device
        self.model.to_empty(device="meta")
        gc.collect()
        release_cache(device)

    def embed(
        self, samples: Sequence[PromptSample], *, row_tokens: int = ROW_TOKENS
    ) -> list[Tensor]:
        """Embed samples of `prompt_sample`; of each [n, d], its tokens from start to end.

        Args:
            samples: are put one behind the other in rows
            row_tokens: most tokens of a row; a longer sample goes alone
        """
        return [piece for row in _rows(samples, row_tokens) for piece in self._embed_row(row)]

    def _embed_row(self, row: Sequence[PromptSample]) -> Iterator[Tensor]:
        samples = [prompt.sample for prompt in row]
        batch = packed_collate(samples, self.transform.pad_id, dense_mask=False)
        wanted = torch.zeros_like(batch["tokens"], dtype=torch.bool)  # [1, n]
        offset, lengths = 0, [len(sample["tokens"]) for sample in samples]
        for prompt, length in zip(row, lengths, strict=True):
            wanted[:, offset + prompt.start : offset + prompt.end] = True
            offset += length
        batch["wanted"] = wanted[0].nonzero()[:, 0]  # [wanted]
        batch_to_device(batch, self.device, self.model.dtype)
        with evaluating(self.model):
            hidden = self.model(
                batch["tokens"],
                input_pos=batch["input_pos"],
                encoder_input=batch.get("encoder_input"),
                placeholder_rows=batch.get("placeholder_rows"),
                mask=torch.tensor(lengths) if len(lengths) > 1 else None,
                output_mask=batch["wanted"],
                output="hidden",
            )  # [wanted, d]
        yield from hidden.split([prompt.end - prompt.start for prompt in row])


def padded(embeds: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack embeddings [n, d] of prompts to [b, l, d] and their mask, int64 [b, l]."""
    mask = pad_sequence(
        [torch.ones(len(one), dtype=torch.int64, device=one.device) for one in embeds],
        batch_first=True,
    )
    return pad_sequence(list(embeds), batch_first=True), mask


def _rows(samples: Iterable[PromptSample], row_tokens: int) -> Iterator[list[PromptSample]]:
    """Cut samples into rows of so many tokens."""
    row: list[PromptSample] = []
    size = 0
    for prompt in samples:
        length = len(prompt.sample["tokens"])
        if row and size + length > row_tokens:
            yield row
            row, size = [], 0
        row.append(prompt)
        size += length
    if row:
        yield row


def _by_prompt(
    prompts: str | Sequence[str], images: Image.Image | Images | None, count: int
) -> list[list[Image.Image]]:
    """Return a list of images for each prompt."""
    if images is None:
        return [[]] * count
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(prompts, str) and not any(isinstance(one, list | tuple) for one in images):
        images = [images]  # type: ignore[list-item]
    if len(images) != count:
        raise ValueError(
            f"images are a list for each prompt, got {len(images)} lists for {count} prompts"
        )
    return [
        [] if one is None else [one] if isinstance(one, Image.Image) else list(one)
        for one in images
    ]
