"""Generation: one prefill, then one token at a time against a static key-value cache.

Nothing is remembered in the model. The position of a new token is the largest of its prompt's on
any axis, plus one for every token since (Qwen's rule); it lives in a local variable.

Shapes: b rows, s prompt tokens, n new tokens, v vocabulary, i images and videos.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.generation._batch import check_prompt, real_tokens
from torchtune_qwen25vl.generation._cache import make_caches
from torchtune_qwen25vl.generation._fixed import ASK_EVERY, fixes_shapes
from torchtune_qwen25vl.generation._forward import decode_one_token, prefill
from torchtune_qwen25vl.generation._places import Places
from torchtune_qwen25vl.generation._sampling import Sampling, check_finite, check_options, choose
from torchtune_qwen25vl.model import KeyValues, Observe


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Tensor  # int64 [b, n]; a row that has ended repeats its stop token
    lengths: list[int]  # new tokens of each row, its stop token included
    finish_reasons: list[Literal["stop", "length"]]


def generate(
    model: TransformerDecoder,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
    observe: Observe | None = None,
) -> Generation:
    """Continue every row of a batch, each with the tokens it would get alone.

    Images are encoded once. The model is left as it was found, after an exception too.

    Args:
        model: Qwen25VL
        batch: what `padded_collate(samples, padding_side="left")` gives, on the model's device;
            without padding no mask is needed
        max_new_tokens: length of the longest continuation
        temperature: 0 is greedy
        top_k: draw among this many likeliest tokens (and those as likely as the last of them)
        top_p: draw among the likeliest tokens that together have this probability
        repetition_penalty: divides (where negative, multiplies) the logits of the tokens that a
            row already holds, prompt included
        stop_tokens: a row ends with the first of these
        generator: source of chance, on the model's device
        on_token: called with the tokens of every step, int64 [b]
        observe: is shown what stands at each site of the model while the prompts are read

    Raises:
        ValueError: if an option is out of range, prompts are padded on the right or padded without
            a mask, or logits are not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    check_options(max_new_tokens, sampling)
    check_prompt(model, batch)
    prompt, real = batch["tokens"], real_tokens(batch)  # [b, s]
    b, s = prompt.shape
    history = torch.where(real, prompt, prompt[:, -1:])  # padding must not count as repetition
    history = torch.cat((history, prompt.new_empty(b, max_new_tokens)), dim=1)  # [b, s + n]
    attended = torch.cat((real, real.new_ones(b, max_new_tokens)), dim=1)  # [b, s + n]
    first = batch["input_pos"].amax((1, 2))[:, None] + 1  # [b, 1]
    positions = first + torch.arange(max_new_tokens, device=prompt.device)  # [b, n]
    stop = torch.tensor(stop_tokens, dtype=prompt.dtype, device=prompt.device)
    done = torch.zeros(b, dtype=torch.bool, device=prompt.device)

    padded = not bool(real.all())
    ask_every = ASK_EVERY if fixes_shapes(model) and on_token is None else 1
    with evaluating(model):
        caches, step = _decoding(model, prompt, positions, attended if padded else None)
        logits = prefill(model, batch if padded else {**batch, "mask": None}, caches, observe)
        check_finite(logits)
        peaks = torch.zeros(b, device=prompt.device)  # from a first nan or inf on, not finite
        for end in range(s, s + max_new_tokens):
            tokens, peak, _ = choose(logits, history[:, :end], sampling, generator)
            peaks += peak
            if stop_tokens:
                tokens = torch.where(done, history[:, end - 1], tokens)
                done |= (tokens[:, None] == stop).any(-1)
            history[:, end] = tokens
            if on_token is not None:
                on_token(tokens)
            asks = stop_tokens and (end - s) % ask_every == 0
            if end + 1 == s + max_new_tokens or (asks and bool(done.all())):
                break
            logits = step(tokens, end)
    check_finite(peaks[:, None])
    return _generation(history[:, s : end + 1], stop)


def _decoding(
    model: TransformerDecoder, prompt: Tensor, positions: Tensor, attended: Tensor | None
) -> tuple[Sequence[KeyValues], Callable[[Tensor, int], Tensor]]:
    """Return caches for the prompts, and what continues them by one token that has a column.

    Args:
        model: Qwen25VL
        prompt: its tokens, [b, s]
        positions: positions of the new tokens, [b, n]
        attended: which columns are no padding, bool [b, s + n]; None where all are
    """
    b, s = prompt.shape
    length = s + positions.shape[1]
    if not fixes_shapes(model):
        growing = make_caches(model, b, length)

        def grow(tokens: Tensor, column: int) -> Tensor:
            seen = None if attended is None else attended[:, : column + 1]
            return decode_one_token(model, tokens, positions[:, column - s], seen, growing)

        return growing, grow
    places = Places(model)
    places.reserve(b, length)
    columns = torch.arange(length, device=prompt.device)
    fixed = places.fixed_step(attended)

    def step(tokens: Tensor, column: int) -> Tensor:
        return fixed(tokens, positions[:, column - s], columns[column].expand(b))

    return places.begin(slice(b), prompt), step


@contextmanager
def evaluating(model: TransformerDecoder) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients; leave it as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # inference mode is faster, but what a sharded model gathers in it could not train again
        with torch.no_grad() if isinstance(model, FSDPModule) else torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def next_log_probs(model: TransformerDecoder, batch: Mapping[str, Any]) -> Tensor:
    """Compute the log-probability of every token after each prompt, fp32 [b, v].

    Args:
        model: Qwen25VL; it is left as it was found
        batch: as for `generate`

    Raises:
        ValueError: if prompts are padded on the right or without a mask, or logits are not finite.
    """
    check_prompt(model, batch)
    with evaluating(model):
        caches = make_caches(model, *batch["tokens"].shape)
        logits = prefill(model, batch, caches)
        check_finite(logits)
        return logits.log_softmax(-1)


class PromptedModel:
    """A model and its prompt's images and positions, for torchtune's own `generate`.

    torchtune's loop hands a model tokens, a mask and positions that it counts by itself:

        generate(PromptedModel(model, batch), batch["tokens"], max_generated_tokens=100, ...)

    Works with and without caches, and remembers nothing: which tokens are new shows in the call.
    A new token may be any, a placeholder too, which then stands for itself.

    Args:
        model: Qwen25VL
        batch: as for `generate`; its padding must be the `pad_id` that the loop is given
    """

    def __init__(self, model: TransformerDecoder, batch: Mapping[str, Any]) -> None:
        check_prompt(model, batch)
        self.model = model
        self.batch = batch

    def __getattr__(self, name: str) -> Any:
        """Caches, their length and the embeddings are the model's."""
        return getattr(self.model, name)

    def __call__(self, tokens: Tensor, *, input_pos: Tensor, mask: Tensor) -> Tensor:
        """Logits of the whole stream [b, s + any], or of one token [b, 1] against caches.

        Args:
            tokens: the prompt and what came after, or only the last token
            input_pos: how many real tokens stand before the token, [b]; not read for a stream
            mask: as the model takes it
        """
        prompt_pos = self.batch["input_pos"]
        after = prompt_pos.amax((1, 2)) + 1  # [b]
        new = tokens.shape[1] - prompt_pos.shape[1]
        if new < 0:
            mask_of_prompt = self.batch.get("mask")
            real = prompt_pos.shape[1] if mask_of_prompt is None else mask_of_prompt[:, -1].sum(-1)
            positions = (after + input_pos - real).view(-1, 1, 1).expand(-1, 1, 3)
            return self.model(tokens, input_pos=positions, mask=mask)
        steps = after[:, None] + torch.arange(new, device=tokens.device)  # [b, new]
        positions = torch.cat((prompt_pos, steps[..., None].expand(-1, -1, 3)), dim=1)
        placeholders = self.model.placeholders(tokens)
        placeholders[:, prompt_pos.shape[1] :] = False
        return self.model(
            tokens,
            input_pos=positions,
            mask=mask,
            encoder_input=self.batch.get("encoder_input"),
            placeholder_rows=placeholders.flatten().nonzero()[:, 0],
        )


def _generation(tokens: Tensor, stop: Tensor) -> Generation:
    is_stop = torch.isin(tokens, stop)
    stopped = is_stop.any(-1)
    lengths = torch.where(stopped, is_stop.int().argmax(-1) + 1, tokens.shape[1]).tolist()
    reasons: list[Literal["stop", "length"]] = ["stop" if s else "length" for s in stopped.tolist()]
    return Generation(tokens[:, : max(lengths)], lengths, reasons)  # all had ended before the end
