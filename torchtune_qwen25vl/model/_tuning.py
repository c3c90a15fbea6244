"""One factory for every linear layer: plain, with an adapter, or kept in NF4."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torchtune.modules import peft
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import LORA_ATTN_MODULES

from torchtune_qwen25vl._torchtune import linear_nf4
from torchtune_qwen25vl.model._products import Linear, linear

Trainable = Literal["frozen", "full", "lora"]
MakeLinear = Callable[..., nn.Module]  # (name, in_dim, out_dim, *, bias) -> module


class LoRALinear(peft.LoRALinear):
    """torchtune's LoRA layer, which scales at the width of the rank and adds in the product.

    Stock goes over the full width three times: it projects, scales, and adds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., in_dim] to [..., out_dim]."""
        if self._quantize_base:
            out = linear_nf4(input=x, weight=self.weight)
            out = out if self.bias is None else out + self.bias
        else:
            out = linear(x, self.weight, self.bias)
        if self.disabled:
            return out
        scaled = (self.alpha / self.rank) * self.lora_a(self.dropout(x))  # [..., rank]
        rows, weight = out.flatten(0, -2), self.lora_b.weight  # [n, out_dim], [out_dim, rank]
        return torch.addmm(rows, scaled.flatten(0, -2), weight.T).view_as(out)


class DoRALinear(peft.DoRALinear):
    """torchtune's DoRA layer with the bias left out of the magnitude.

    Stock multiplies the bias too while it trains, but not when it merges, and PEFT never does:
    with biases on q, k and v the merged model would not be the trained one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., in_dim] to [..., out_dim]."""
        out = linear(x, self.weight)
        if not self.disabled:
            delta = self.lora_b.weight @ self.lora_a.weight  # [out_dim, in_dim]
            norm = self._get_weight_norm(self.weight.to(x.dtype), delta).detach()  # [out_dim]
            out = out + self.scaling * self.lora_b(self.lora_a(self.dropout(x)))
            out = self.magnitude / norm * out
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Which parts of the model are trained, and how.

    A part is "full" (all its weights), "lora" (adapters only) or "frozen". torchtune's LoRA
    recipes train the adapters of the whole model and nothing else, its full recipes whatever is
    not frozen.

    Args:
        decoder_trainable: embeddings, decoder layers, norm and output
        vision_trainable: vision encoder without its merger
        merger_trainable: `vision.merger`, which joins encoder and decoder
        lora_attn_modules: projections that get an adapter: q_proj, k_proj, v_proj, output_proj
        apply_lora_to_mlp: adapters on w1, w2 and w3 too; the merger has no other layers
        apply_lora_to_output: an adapter on the decoder's output too
        lora_rank: rank of all adapters
        lora_alpha: scale of all adapters, times their rank
        lora_dropout: probability of dropping an adapter's input
        use_dora: adapters are DoRA, https://arxiv.org/abs/2402.09353
        quantize_base: hold the linear layers of the decoder in NF4, but never its output;
            https://arxiv.org/abs/2305.14314

    Raises:
        ValueError: if an option is unknown or would have no effect.
    """

    decoder_trainable: Trainable = "full"
    vision_trainable: Trainable = "full"
    merger_trainable: Trainable = "full"
    lora_attn_modules: Sequence[LORA_ATTN_MODULES] = ()
    apply_lora_to_mlp: bool = False
    apply_lora_to_output: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_dora: bool = False
    quantize_base: bool = False

    def __post_init__(self) -> None:
        parts = (self.decoder_trainable, self.vision_trainable, self.merger_trainable)
        for given, known in ((parts, Trainable), (self.lora_attn_modules, LORA_ATTN_MODULES)):
            if unknown := set(given) - set(get_args(known)):
                raise ValueError(f"unknown {sorted(unknown)}; choose from {list(get_args(known))}")
        adapted = bool(self.lora_attn_modules or self.apply_lora_to_mlp)
        if adapted != ("lora" in parts):
            raise ValueError(
                "adapters need a part that is 'lora', and such a part needs adapters, got decoder, "
                f"vision, merger {parts}, lora_attn_modules {list(self.lora_attn_modules)}, "
                f"apply_lora_to_mlp {self.apply_lora_to_mlp}"
            )
        if self.merger_trainable == "lora" and not self.apply_lora_to_mlp:
            raise ValueError(
                "the merger is an MLP, so merger_trainable 'lora' needs apply_lora_to_mlp; "
                "set that, or train the merger 'full' or not at all"
            )
        if self.apply_lora_to_output and self.decoder_trainable != "lora":
            raise ValueError(
                "apply_lora_to_output needs decoder_trainable 'lora', got "
                f"{self.decoder_trainable!r}; the output belongs to the decoder"
            )
        if self.quantize_base and self.decoder_trainable == "full":
            raise ValueError(
                "NF4 weights cannot be trained, so quantize_base needs decoder_trainable 'lora' or "
                "'frozen', got 'full'"
            )

    def linear(self, part: Literal["decoder", "vision", "merger"]) -> MakeLinear:
        """Make the factory of one part's linear layers."""
        trainable = getattr(self, f"{part}_trainable")
        quantize = self.quantize_base and part == "decoder"
        adapted = [
            *self.lora_attn_modules,
            *(("w1", "w2", "w3") if self.apply_lora_to_mlp else ()),
            *(("output",) if self.apply_lora_to_output else ()),
        ]

        def make(name: str, in_dim: int, out_dim: int, *, bias: bool) -> nn.Module:
            nf4 = quantize and name != "output"
            if trainable == "lora" and name in adapted:
                return (DoRALinear if self.use_dora else LoRALinear)(
                    in_dim,
                    out_dim,
                    rank=self.lora_rank,
                    alpha=self.lora_alpha,
                    dropout=self.lora_dropout,
                    use_bias=bias,
                    quantize_base=nf4,
                )
            return (FrozenNF4Linear if nf4 else Linear)(in_dim, out_dim, bias=bias)

        return make
