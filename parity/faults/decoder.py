"""Faults of the decoder and of the loss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parity.faults._fault import (
    Arguments,
    Fault,
    change,
    edited,
    exchange,
    on_entry,
    on_exit,
    replaced,
)
from parity.faults.encoder import rms_norms
from torchtune_qwen25vl.model import labelled_cross_entropy


def _one_axis(model: Any) -> None:
    def count(arguments: Arguments) -> Arguments:
        b, s = arguments["tokens"].shape
        index = torch.arange(s, device=arguments["tokens"].device)
        return {"input_pos": index.view(1, -1, 1).expand(b, -1, 3)}

    on_entry(model, count)


def _not_causal(model: Any) -> None:
    def see_all(arguments: Arguments) -> Arguments:
        b, s = arguments["tokens"].shape
        ones = torch.ones(b, s, s, dtype=torch.bool, device=arguments["tokens"].device)
        return {"mask": ones}

    on_entry(model, see_all)


def _interleave_axes(model: Any) -> None:
    rope = model.pos_embeddings
    change(rope, mrope_section=[1] * len(rope.inv_freq))  # the k-th section follows axis k % 3


def _permute_sections(model: Any) -> None:
    rope = model.pos_embeddings
    change(rope, mrope_section=rope.mrope_section[1:] + rope.mrope_section[:1])


def _rope_base(model: Any) -> None:
    change(model.pos_embeddings, base=10_000.0)
    with model.pos_embeddings.inv_freq.device:
        model.pos_embeddings.rope_init()


def _round_rotations(model: Any) -> None:
    on_exit(model.pos_embeddings, lambda arguments, output: output.bfloat16().to(output.dtype))


def _eps(model: Any) -> None:
    for part in (model.layers, model.norm):
        for norm in rms_norms(part):
            change(norm, eps=1e-5)


def _drop_k_bias(model: Any) -> None:
    for layer in model.layers:
        change(layer.attn.k_proj, bias=None)


def _query_heads_interleaved(model: Any) -> None:
    for layer in model.layers:
        attn = layer.attn
        q, heads = attn.q_proj.weight, attn.num_heads
        shuffled = q.unflatten(0, (heads, -1)).roll(1, 0).flatten(0, 1)
        change(attn.q_proj, weight=nn.Parameter(shuffled))


def _exchange_gate_and_up(model: Any) -> None:
    for layer in model.layers:
        exchange(layer.mlp, "w1", "w3")


def _untie(model: Any) -> None:
    weight = model.tok_embeddings.weight
    with weight.device:
        change(model, output=nn.Linear(weight.shape[1], weight.shape[0], bias=False))


def _shift_again(right: Callable) -> Callable:
    def wrong(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return right(hidden[..., :-1, :], weight, labels[..., 1:], **options)

    return wrong


def _norms_in_bf16(model: Any) -> None:
    """Every norm computes in the dtype of its input; fp32 models stay right."""
    for norm in rms_norms(model):

        def normalise(arguments: Arguments, output: Tensor, norm: Any = norm) -> Tensor:
            (x,) = arguments.values()
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.scale

        on_exit(norm, normalise)


FAULTS: dict[str, Fault] = {
    "one-axis positions": edited(_one_axis, "decoder layers"),
    "M-RoPE axes interleaved": edited(_interleave_axes, "decoder layers"),
    "mrope_section permuted": edited(_permute_sections, "decoder layers"),
    "rope_base 10,000": edited(_rope_base, "decoder layers"),
    "bf16 rotary tables": edited(_round_rotations, "decoder layers"),
    "text eps 1e-5": edited(_eps, "logits"),
    "k bias dropped": edited(_drop_k_bias, "decoder layers"),
    "query heads out of their groups": edited(_query_heads_interleaved, "decoder layers"),
    "gate and up exchanged": edited(_exchange_gate_and_up, "decoder layers"),
    "attention not causal": edited(_not_causal, "decoder layers"),
    "norms in bf16": edited(_norms_in_bf16, "bf16"),
    "untied head": edited(_untie, "logits"),
    "labels shifted twice": replaced(labelled_cross_entropy, _shift_again, "loss"),
}
