"""What their models compute on a batch."""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from parity.inputs import Inputs
from parity.reference.models import ids, random_model

VERSION = transformers.__version__


def core(model: Qwen2_5_VLForConditionalGeneration) -> Any:
    """What holds the vision tower and knows positions: before 4.52 the whole model."""
    return model.model if hasattr(model.model, "visual") else model


def since_4_52(name: str) -> str:
    """The name of a parameter since 4.52, when the decoder became one part of what `model` is."""
    if name.startswith("visual."):
        return f"model.{name}"
    return re.sub(r"^model\.(?!visual\.|language_model\.)", "model.language_model.", name)


def forward_kwargs(inputs: Inputs) -> dict[str, Tensor]:
    """Inputs in their names, with our positions passed in (Qwen's rule, not this version's)."""
    kwargs = {
        "input_ids": inputs.tokens,
        "attention_mask": inputs.attention_mask,
        "position_ids": inputs.positions.permute(2, 0, 1),  # [3, b, s]
    }
    return kwargs | media_kwargs(inputs)


def media_kwargs(inputs: Inputs) -> dict[str, Tensor]:
    """Images and videos apart, as theirs takes them."""
    kwargs, names = {}, (("pixel_values", "image"), ("pixel_values_videos", "video"))
    pieces = inputs.pixel_values.split(inputs.grid_thw.prod(-1).tolist())
    for is_video, (values, kind) in enumerate(names):
        chosen = [k for k, video in enumerate(inputs.is_video) if video == bool(is_video)]
        if chosen:
            kwargs[values] = torch.cat([pieces[k] for k in chosen])
            kwargs[f"{kind}_grid_thw"] = inputs.grid_thw[chosen]
    return kwargs


def process_logits(
    logits: Tensor,
    history: Tensor,
    *,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
) -> Tensor:
    """Scores [b, v] after their processors, in the order in which their `generate` has them."""
    processors = transformers.LogitsProcessorList()
    processors.append(transformers.RepetitionPenaltyLogitsProcessor(repetition_penalty))
    processors.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k is not None:
        processors.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(transformers.TopPLogitsWarper(top_p))
    return processors(history, logits)


def positions(model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> Tensor:
    """The positions this version of transformers computes by itself, [b, s, 3]."""
    grids = {k: v for k, v in media_kwargs(inputs).items() if k.endswith("grid_thw")}
    if inputs.seconds:
        grids["second_per_grid_ts"] = torch.tensor(_seconds(inputs))
    grids |= _token_types(model, inputs)
    positions, _ = core(model).get_rope_index(
        inputs.tokens, attention_mask=inputs.attention_mask, **grids
    )
    return positions.permute(1, 2, 0)  # [b, s, 3]


def _seconds(inputs: Inputs) -> list[float]:
    """Seconds between frame groups; 5.3 to 5.5 take one for every image too, or stop."""
    if VERSION.startswith(("5.3.", "5.4.", "5.5.")):
        seconds = iter(inputs.seconds)
        return [next(seconds) if is_video else 1.0 for is_video in inputs.is_video]
    return list(inputs.seconds)


def _token_types(model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> dict[str, Tensor]:
    """What transformers 5 needs to tell image from text: 0 text, 1 image, 2 video."""
    if VERSION.startswith("4."):
        return {}
    image, video = (inputs.tokens == ids(model)[f"{k}_token_id"] for k in ("image", "video"))
    return {"mm_token_type_ids": image.int() + 2 * video.int()}


def window_order(grid_thw: list[tuple[int, int, int]]) -> tuple[Tensor, list[int]]:
    """Their window order and window lengths in patches, computed by their vision tower."""
    grids = torch.tensor(grid_thw)
    try:
        from transformers.vision_utils import get_vision_window_index
    except ImportError:  # transformers 4.57: a method of the tower
        order, bounds = core(random_model("tiny")).visual.get_window_index(grids)
        bounds = torch.unique_consecutive(torch.tensor(bounds))
    else:
        order, bounds = get_vision_window_index(
            grids, spatial_merge_size=2, window_size=112, patch_size=14
        )
    return order, bounds.diff().tolist()


def patch_positions(grid_thw: list[tuple[int, int, int]]) -> Tensor:
    """Their row and column of every patch, [p, 2]."""
    grids = torch.tensor(grid_thw)
    try:
        from transformers.vision_utils import get_vision_position_ids
    except ImportError:  # transformers 4.57 has no function for it; its rotary angles tell
        angles = core(random_model("tiny")).visual.rot_pos_emb(grids)  # [p, head_dim / 2]
        return angles[:, [0, angles.shape[1] // 2]].round().long()
    return get_vision_position_ids(grids, 2)


def step_loss(
    model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs, label_count: int
) -> Tensor:
    """Their loss of one batch of a step whose batches have this many labels together.

    Before 4.53 the model does not take their number and gives the mean over its own batch.
    """
    kwargs: dict[str, Any] = {**forward_kwargs(inputs), "labels": inputs.labels}
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return model(**kwargs, num_items_in_batch=label_count).loss
    return model(**kwargs).loss * inputs.label_count / label_count


def vision_layers(model: Qwen2_5_VLForConditionalGeneration) -> nn.ModuleList:
    """The blocks of the vision tower."""
    return core(model).visual.blocks


def decoder_layers(model: Qwen2_5_VLForConditionalGeneration) -> nn.ModuleList:
    """The layers of the language model."""
    return getattr(model.model, "language_model", model.model).layers


def encode(model: Qwen2_5_VLForConditionalGeneration, inputs: Inputs) -> Tensor:
    """What the vision tower returns for all images and videos of a batch, [m, d]."""
    values = inputs.pixel_values.to(model.dtype)
    output = core(model).visual(values, grid_thw=inputs.grid_thw)
    return output if isinstance(output, Tensor) else output.pooler_output


@contextlib.contextmanager
def linear_patch_embed(model: Qwen2_5_VLForConditionalGeneration) -> Iterator[None]:
    """Compute their Conv3d patch embedding, whose kernel is its stride, as a matrix product."""
    embed = core(model).visual.patch_embed
    weight = embed.proj.weight.flatten(1)
    with mock.patch.object(embed, "forward", lambda x: nn.functional.linear(x, weight)):
        yield


class _Listener(BaseStreamer):
    """Calls back at every token, but not at the prompt."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self.on_token, self.calls = on_token, 0

    def put(self, value: Tensor) -> None:
        if self.calls:
            self.on_token()
        self.calls += 1

    def end(self) -> None: ...


def greedy(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: Inputs,
    max_new_tokens: int,
    on_token: Callable[[], None] | None = None,
) -> Tensor:
    """Their greedy continuation [b, n] of left-padded prompts, from Qwen's positions."""
    streamer = None if on_token is None else _Listener(on_token)
    return generate(model, inputs, max_new_tokens, streamer, do_sample=False)


def generate(
    model: Qwen2_5_VLForConditionalGeneration,
    inputs: Inputs,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> Tensor:
    """Their continuation [b, n] of left-padded prompts, from Qwen's positions."""
    last = inputs.positions.amax((1, 2)) + 1
    real = inputs.attention_mask.sum(1)  # transformers 4 counts padding too
    length = inputs.tokens.shape[1] if VERSION.startswith("4.") else real
    deltas = (last - length).unsqueeze(1)  # [b, 1]
    answer = (inputs.positions.permute(2, 0, 1), deltas)
    no_end = model.config.get_text_config().vocab_size  # None would be the config's own end
    settings = {"max_new_tokens": max_new_tokens, "eos_token_id": no_end, "pad_token_id": 0}
    with mock.patch.object(core(model), "get_rope_index", return_value=answer):
        tokens = model.generate(
            inputs.tokens,
            attention_mask=inputs.attention_mask,
            generation_config=GenerationConfig(**{**settings, **options}),
            streamer=streamer,
            **media_kwargs(inputs),
            **_token_types(model, inputs),
        )
    return tokens[:, inputs.tokens.shape[1] :]


def answer(
    model: Qwen2_5_VLForConditionalGeneration, processor: Any, question: str, image: Image.Image
) -> list[int]:
    """Return their greedy answer to a question about an image, its end included."""
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": parts}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()
