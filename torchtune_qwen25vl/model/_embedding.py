"""The embedding of tokens that is the output projection too.

Shapes: b batch, s sequence, d width, v vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune import modules

from torchtune_qwen25vl.model._products import linear


class TiedEmbedding(nn.Embedding):
    """Embedding whose weight, [v, d], is the output projection too."""

    def forward(self, tokens: Tensor, *, add_to_grad: bool = False) -> Tensor:
        """Look up int [b, s], to [b, s, d].

        Autograd would hold a gradient as large as the weight for each of its two uses, and then
        add them. With `add_to_grad` the backward of the lookup adds its few rows to `weight.grad`.

        Args:
            tokens: rows to look up
            add_to_grad: add to `weight.grad`; the caller calls `backward()`, by which the output's
                gradient is there first
        """
        if not (add_to_grad and self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(tokens)
        rows, inverse = tokens.unique(return_inverse=True)
        leaf = self.weight.detach()[rows].requires_grad_()  # [rows, d]

        def add(leaf: Tensor) -> None:
            assert leaf.grad is not None
            assert self.weight.grad is not None
            self.weight.grad.index_add_(0, rows, leaf.grad)
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(add)
        return F.embedding(inverse, leaf)


class TiedOutput(modules.TiedLinear):
    """torchtune's projection by a tied weight, with a product that is ours."""

    def __init__(self, tied_module: nn.Module) -> None:
        super().__init__(tied_module)
        self.linear = _Product()  # a module, which torchtune hooks when it offloads activations


class _Product(nn.Module):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Project [..., d] to [..., v] by [v, d]."""
        return linear(x, weight)
