"""What a side makes of a question, and ours.

Shapes: s prompt tokens, n new tokens, p patches, i images and videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchtune.data import Message

from parity.serve._questions import Question
from torchtune_qwen25vl import Qwen25VL, Qwen25VLTransform, generate
from torchtune_qwen25vl.generation import prompt_batch


@dataclass(frozen=True)
class Answer:
    """What a side makes of a question; None where it does not say.

    Attributes:
        prompt: tokens of the prompt, [s]
        tokens: greedy answer, [n]
        logprobs: log-probability of each of its tokens, [n]
        patches: normalized pixels, fp32 [p, patch_dim]
        grids: frames, rows and columns of patches, [i, 3]
        positions: of the prompt, [s, 3]
        margins: how far the second token's log-probability is below the first's, [n]
    """

    prompt: list[int] | None
    tokens: list[int]
    logprobs: list[float]
    patches: np.ndarray | None = None
    grids: list[list[int]] | None = None
    positions: list[list[int]] | None = None
    margins: list[float] | None = None


def ask_ours(
    model: Qwen25VL,
    transform: Qwen25VLTransform,
    questions: Sequence[Question],
    new_tokens: int,
) -> dict[str, Answer]:
    """Answer questions, by name."""
    answers = {}
    for question in questions:
        sample = _sample(transform, question)
        batch = prompt_batch([sample], transform.pad_id)
        (tokens,) = generate(model, batch, max_new_tokens=new_tokens).tokens.tolist()
        answers[question.name] = _answer(model, sample, tokens)
    return answers


def _sample(transform: Qwen25VLTransform, question: Question) -> dict[str, Any]:
    images, videos = iter(question.images), iter(question.videos)
    messages = []
    for turn in question.messages:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages.append(Message(turn["role"], [_part(part, images, videos) for part in parts]))
    return transform({"messages": messages}, inference=True)


def _part(part: dict[str, Any], images: Any, videos: Any) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "content": Image.open(next(images)).convert("RGB")}
    if part["type"] == "video":
        path, rate = next(videos)
        frames = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)  # [frames, 3, h, w]
        return {"type": "video", "content": frames, "fps": rate}
    return {"type": "text", "content": part["text"]}


@torch.inference_mode()
def _answer(model: Qwen25VL, sample: dict[str, Any], tokens: list[int]) -> Answer:
    """Ask for the log-probabilities of an answer in one forward, without caches."""
    prompt = torch.as_tensor(sample["tokens"])
    positions = torch.as_tensor(sample["input_pos"])  # [s, 3]
    steps = positions.max() + 1 + torch.arange(len(tokens))
    stream = torch.cat((prompt, torch.tensor(tokens)))[None]  # [1, s + n]
    rows = model.placeholders(stream)[0, : len(prompt)].nonzero()[:, 0]  # [m]
    logits = model(
        stream,
        input_pos=torch.cat((positions, steps[:, None].expand(-1, 3)))[None],
        encoder_input=sample.get("encoder_input"),
        placeholder_rows=rows,
        output="logits",
    )[0, len(prompt) - 1 : -1]  # [n, v]
    scores = logits.log_softmax(-1)
    best = scores.topk(2).values
    vision = sample.get("encoder_input", {}).get("vision", {})
    return Answer(
        prompt.tolist(),
        tokens,
        scores.gather(-1, torch.tensor(tokens)[:, None]).flatten().tolist(),
        _numpy(vision.get("pixel_values")),
        vision["grid_thw"].tolist() if vision else [],
        positions.tolist(),
        (best[:, 0] - best[:, 1]).tolist(),
    )


def _numpy(pixels: Tensor | None) -> np.ndarray | None:
    return None if pixels is None else pixels.float().numpy()
