"""Weights packed once in the order in which oneDNN reads them, for inference on a CPU.

torch hands products in fp32 to MKL, which packs the weights anew in every call; for few rows, as
in decoding, that takes most of the time. oneDNN, which torch carries too, is given them packed.

Shapes: b batch, s sequence, n rows, d width, v vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_qwen25vl.model._decoder import Qwen25VL
from torchtune_qwen25vl.model._embedding import TiedEmbedding
from torchtune_qwen25vl.model._products import Linear, by_onednn

LEAST_WEIGHTS = {torch.float32: 2**16, torch.bfloat16: 1}  # of a layer; below it, plain is faster
FEWEST_ROWS = 4  # one row takes longer than four: the kernel has too few sums in flight
BLOCK = 512  # tokens whose embeddings are packed together


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is packed while it is on a CPU.

    It can be moved and cast, at the price of a copy, but neither trained nor saved.

    Args:
        weight: [out_dim, in_dim]
        bias: [out_dim], or None
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", _packed(weight.detach()))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Project [..., in_dim] to [..., out_dim]."""
        if not self.weight.is_mkldnn:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)  # [n, in_dim]
        if (missing := FEWEST_ROWS - len(rows)) > 0:
            rows = F.pad(rows, (0, 0, 0, missing))
        out = by_onednn(rows, self.weight, self.bias)
        return out[: x.shape[:-1].numel()].unflatten(0, x.shape[:-1])

    def dense(self) -> Tensor:
        """Return the weight in plain order, of a packed one a copy."""
        return self.weight.to_dense() if self.weight.is_mkldnn else self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        self.weight = _packed(fn(self.dense()))
        self.bias = None if self.bias is None else fn(self.bias)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ValueError(
            f"{prefix}weight is packed for inference and has no form to save: save the model "
            "before it is packed"
        )


class PackedEmbedding(nn.Module):
    """A tied embedding that is packed in blocks of tokens, since the output reads all of it.

    A lookup unpacks the blocks in which its tokens are, so there is no second copy of the weight.

    Args:
        weight: [v, d]
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PackedLinear(part) for part in weight.split(BLOCK))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int [b, s], to [b, s, d]."""
        places = tokens.flatten()  # [n]
        blocks, inverse = (places // BLOCK).unique(return_inverse=True)
        dense = torch.cat([self._block(index).dense() for index in blocks.tolist()])
        return F.embedding(inverse * BLOCK + places % BLOCK, dense).unflatten(0, tokens.shape)

    def project(self, x: Tensor) -> Tensor:
        """Project [..., d] to the vocabulary, [..., v]."""
        return torch.cat([block(x) for block in self.blocks], dim=-1)

    def _block(self, index: int) -> PackedLinear:
        block = self.blocks[index]
        assert isinstance(block, PackedLinear)
        return block


def pack(model: Qwen25VL, *, least_weights: int | None = None) -> Qwen25VL:
    """Pack the linear layers of a model that is on a CPU, one at a time; return it.

    The model is for inference from then on. Layers with an adapter, in another format than fp32 and
    bf16, and small ones stay as they are.

    Args:
        model: with its weights; it is changed
        least_weights: size of the smallest layer that is packed; by default where that is faster
    """

    def gains(weight: Tensor) -> bool:
        least = LEAST_WEIGHTS.get(weight.dtype)
        return least is not None and weight.numel() >= (least_weights or least)

    # by name: a list of layers would keep every plain weight until the last one is packed
    for path in [path for path, layer in model.named_modules() if type(layer) is Linear]:
        layer: Any = model.get_submodule(path)
        if gains(layer.weight):
            model.set_submodule(path, PackedLinear(layer.weight, layer.bias))
    embedding = model.tok_embeddings
    if isinstance(embedding, TiedEmbedding) and gains(embedding.weight):
        model.tok_embeddings = PackedEmbedding(embedding.weight)
        model.output = model.tok_embeddings.project
    return model


def _packed(weight: Tensor) -> Tensor:
    if weight.device.type != "cpu" or weight.dtype not in LEAST_WEIGHTS:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
