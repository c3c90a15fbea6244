"""Their answers to conversations, as a program that serves a folder by transformers gives them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from parity.reference.models import load


class Server:
    """A folder's model and processor, in fp32.

    Args:
        folder: the model
        template: chat template of a folder that has none; None for one that has its own
    """

    def __init__(self, folder: Path, template: str | None) -> None:
        self._model = load(str(folder), torch.float32)
        self._processor = AutoProcessor.from_pretrained(folder)
        self._template = template

    @torch.inference_mode()
    def answer(
        self,
        messages: Sequence[dict[str, Any]],
        images: list[Any],
        videos: list[tuple[Any, float]],
        new_tokens: int,
    ) -> tuple[list[int], list[int], list[float]]:
        """Return the tokens of a prompt, of the greedy answer, and their log-probabilities.

        Args:
            messages: turns, their media being `{"type": "image"}` and `{"type": "video"}`
            images: PIL images, in order
            videos: uint8 [frames, height, width, 3], each with its frames a second
            new_tokens: length of the answer
        """
        options = {} if self._template is None else {"chat_template": self._template}
        text = self._processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **options
        )
        rates = [
            {"fps": fps, "total_num_frames": len(frames), "frames_indices": range(len(frames))}
            for frames, fps in videos
        ]
        media: dict[str, Any] = {"images": images} if images else {}
        if videos:
            media |= {"videos": [frames for frames, _ in videos], "do_sample_frames": False}
            media["video_metadata"] = rates
        inputs = self._processor(text=[text], return_tensors="pt", **media)
        prompt = inputs["input_ids"][0]
        no_end = self._model.config.get_text_config().vocab_size
        out = self._model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=no_end,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = out.sequences[0, len(prompt) :]  # [n]
        scores = torch.cat(out.logits).float().log_softmax(-1)  # [n, v]
        chosen = scores.gather(-1, tokens[:, None]).flatten()
        return prompt.tolist(), tokens.tolist(), chosen.tolist()
