"""The node that describes images."""

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchtune.data import Message

from torchtune_qwen25vl.captioning import PRESETS, read_preset
from torchtune_qwen25vl.comfyui._host import ManagedEncoder, progress
from torchtune_qwen25vl.comfyui._images import to_pil
from torchtune_qwen25vl.comfyui._loader import CATEGORY, ENCODER
from torchtune_qwen25vl.conditioning import PromptEncoder
from torchtune_qwen25vl.generation import Generation, generate, inference_batch
from torchtune_qwen25vl.jobs import read_pixels, seeded
from torchtune_qwen25vl.transform import PLACEHOLDER_PIXELS

MIN_PIXELS, MAX_PIXELS = 4 * PLACEHOLDER_PIXELS, 1280 * PLACEHOLDER_PIXELS
MOST_PIXELS = 16384 * PLACEHOLDER_PIXELS  # of Qwen's own processor
SAMPLING = ("preset", "greedy", "temperature")


class Caption:
    """Describe images with the encoder that is loaded already."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    RETURN_TYPES = ("STRING",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "caption"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        prompt = "A question of your own in place of the preset's."
        sampling = "greedy: the same caption every time; temperature: drawn, by the value below."
        tokens = "Length of the longest caption, in tokens. 0: as the preset has it."
        pixels = "Images of more pixels are shrunk to so many."
        return {
            "required": {
                "encoder": (ENCODER,),
                "images": ("IMAGE", {"tooltip": "One caption for each image of the batch."}),
                "preset": (list(PRESETS),),
                "prompt": ("STRING", {"default": "", "multiline": True, "tooltip": prompt}),
                "sampling": (list(SAMPLING), {"tooltip": sampling}),
                "temperature": ("FLOAT", {"default": 0.7, "min": 0.01, "max": 2.0, "step": 0.01}),
                "max_new_tokens": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": tokens}),
                "max_pixels": (
                    "INT",
                    {
                        "default": MAX_PIXELS,
                        "min": MIN_PIXELS,
                        "max": MOST_PIXELS,
                        "step": PLACEHOLDER_PIXELS,
                        "tooltip": pixels,
                    },
                ),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            }
        }

    def caption(
        self,
        encoder: ManagedEncoder,
        images: Tensor,
        preset: str,
        prompt: str,
        sampling: str,
        temperature: float,
        max_new_tokens: int,
        max_pixels: int,
        seed: int,
    ) -> tuple[list[str]]:
        """Describe each image by itself, so that its caption is the one that it gets alone."""
        asked = read_preset(
            preset,
            max_new_tokens=max_new_tokens or None,
            temperature={"preset": None, "greedy": 0.0, "temperature": temperature}[sampling],
        )
        question = prompt.strip() or asked.prompt
        shown = [read_pixels(image, MIN_PIXELS, max_pixels) for image in to_pil(images)]
        most = asked.max_new_tokens
        set_progress = progress(len(shown) * most)
        ready, captions = encoder.ready(), []
        for number, pixels in enumerate(shown):
            generation = generate(
                ready.model,
                _batch(ready, pixels, question),
                max_new_tokens=most,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                repetition_penalty=asked.repetition_penalty,
                stop_tokens=ready.transform.stop_tokens,
                generator=seeded(seed, str(number), ready.device),
                on_token=_counted(set_progress, number * most),
            )
            captions.append(_text(ready, generation))
        set_progress(len(shown) * most)
        return (captions,)


def _batch(encoder: PromptEncoder, pixels: np.ndarray, question: str) -> dict[str, Any]:
    content = [
        {"type": "image", "content": Image.fromarray(pixels), "resized": True},
        {"type": "text", "content": question},
    ]
    messages = [[Message("user", content)]]
    return inference_batch(messages, encoder.transform, device=encoder.device)


def _counted(set_progress: Callable[[int], None], before: int) -> Callable[[Tensor], None]:
    """Return what is called with each token, so many being done before the first."""
    done = count(before + 1)
    return lambda _: set_progress(next(done))


def _text(encoder: PromptEncoder, generation: Generation) -> str:
    tokens = generation.tokens[0, : generation.lengths[0]].tolist()
    said = tokens[:-1] if generation.finish_reasons[0] == "stop" else tokens
    return encoder.transform.decode(said).strip()
