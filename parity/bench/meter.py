"""What a GPU would be asked to do, counted without one: launches, bytes, waits of the host.

A model without memory (the device meta) goes through the very code that a GPU runs. Every operation
on its tensors is one launch, but what is compiled is one for each call, and attention and norms are
the one kernel that torch has for them. Milliseconds are estimated: each launch takes as long as its
arithmetic or its bytes take at the speeds of a card, and no time passes between launches.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtune_qwen25vl.model._fused import swiglu
from torchtune_qwen25vl.model._positional_embeddings import rotate

PIECES = {piece.__wrapped__.__code__: piece.__name__ for piece in (rotate, swiglu)}  # type: ignore
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty"),
    *("detach", "lift_fresh", "alias", "_unsafe_view"),
}
PRODUCTS = {"linear", "mm", "addmm", "bmm"}
READS_ROWS = {"embedding", "index_select", "index", "gather"}  # of their first input, few


class Card(NamedTuple):
    """Speeds that large operations reach, not those of a data sheet."""

    name: str
    products: float  # bf16, FLOP/s
    attention: float
    memory: float  # bytes/s


H100 = Card("H100", 650e12, 400e12, 2.9e12)
H200 = Card("H200", 650e12, 400e12, 4.2e12)


@dataclass
class Cost:
    """What a piece of work comes to.

    Attributes:
        launches: how often each operation is launched
        copies: how often something comes from the host
        waits: how often the host waits for the device
        masks: elements of the largest mask that attention was given
        work: of each launch its kind, its arithmetic in FLOP and its bytes
    """

    launches: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    waits: int = 0
    masks: int = 0
    work: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, name: str, flops: float, moved: float, launches: int = 1) -> None:
        """Count a launch."""
        self.launches[name] += launches
        self.work.append((name, flops, moved))

    @property
    def total(self) -> int:
        """All launches."""
        return self.launches.total()

    @property
    def gigabytes(self) -> float:
        """All bytes that launches read and write."""
        return sum(moved for _, _, moved in self.work) / 1e9

    def milliseconds(self, card: Card) -> float:
        """Estimate the time on a card."""
        speeds = {"attention": card.attention}
        return 1e3 * sum(
            max(flops / speeds.get(name, card.products), moved / card.memory)
            for name, flops, moved in self.work
        )

    def floor(self, card: Card, weights: float) -> float:
        """Estimate the time of the products and of reading the weights once, in milliseconds."""
        flops = sum(flops for name, flops, _ in self.work if name in PRODUCTS)
        return 1e3 * max(flops / card.products, weights / card.memory)


@contextmanager
def metered() -> Iterator[Cost]:
    """Count what is done with tensors of the device meta."""
    cost = Cost()
    with _Kernels(cost), _Operations(cost):
        yield cost


class _Operations(TorchDispatchMode):
    """Counts operations, those of a compiled piece as one."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.cost, self.piece = cost, None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        inputs = _tensors((args, kwargs))
        if name == "_local_scalar_dense" and inputs[0].is_meta:
            self.cost.waits += 1
            return 1.0 if inputs[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        outputs = _tensors(out)
        if not any(tensor.is_meta for tensor in outputs) or name in NO_KERNEL or func.is_view:
            return out
        if not all(tensor.is_meta for tensor in inputs if tensor.ndim):
            self.cost.copies += 1
            return out
        if name in ("to", "contiguous", "reshape") and out is args[0]:
            return out
        self._count(name, inputs, outputs)
        return out

    def _count(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        moved = sum(map(_bytes, outputs)) + sum(map(_bytes, inputs))
        if name in READS_ROWS:
            moved = 2 * sum(map(_bytes, outputs))
        piece = _piece()
        if piece is None:
            self.cost.add(name, _flops(name, inputs, outputs), moved)
        elif piece[1] is not self.piece:
            self.piece = piece[1]
            self.cost.add(piece[0], 0.0, 2.0 * max(map(_bytes, (*inputs, *outputs))))


def _piece() -> tuple[str, Any] | None:
    """Find the compiled piece that is running: its name, and its call."""
    frame = sys._getframe(3)
    while frame is not None:
        if frame.f_code in PIECES:
            return PIECES[frame.f_code], frame
        frame = frame.f_back  # type: ignore[assignment]
    return None


class _Kernels(TorchFunctionMode):
    """Takes the functions for which torch has one kernel."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self.kernels: dict[Callable, Callable] = {
            F.scaled_dot_product_attention: self._attention,
            F.rms_norm: self._norm,
            Tensor.tolist: self._tolist,
            Tensor.unique: self._unique,
        }
        self.cost = cost

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = self.kernels.get(func)
        if kernel is None or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        return kernel(*args, **(kwargs or {}))

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        shares = q.shape[1] != k.shape[1]
        if attn_mask is not None:
            assert attn_mask.is_floating_point(), "every layer would turn the mask into numbers"
            assert not shares, "a GPU has no kernel for a mask and shared heads"
            self.cost.masks = max(self.cost.masks, attn_mask.numel())
        share = 0.5 if options.get("is_causal") else 1.0
        return _Attention.apply(self.cost, q, k, v, share, attn_mask)

    def _norm(self, x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _Norm.apply(self.cost, x, weight)

    def _tolist(self, tensor: Tensor) -> Any:
        self.cost.waits += 1
        return torch.ones_like(tensor, device="cpu").tolist()

    def _unique(self, tensor: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        self.cost.waits += 1  # for how many there are; here no two are equal
        self.cost.add("unique", 0.0, 4.0 * _bytes(tensor))
        return tensor.flatten(), tensor.clone()


class _Attention(torch.autograd.Function):
    """One kernel forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any, cost: Cost, q: Tensor, k: Tensor, v: Tensor, share: float, mask: Tensor | None
    ) -> Tensor:
        b, heads, s, width = q.shape
        ctx.cost, ctx.flops = cost, 4.0 * share * b * heads * s * k.shape[2] * width
        ctx.save_for_backward(q, k, v)
        out = torch.empty(b, s, heads, width, dtype=q.dtype, device="meta").transpose(1, 2)
        moved = sum(map(_bytes, (q, k, v, out))) + (0 if mask is None else _bytes(mask))
        cost.add("attention", ctx.flops, moved)
        return out

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        moved = 2.0 * sum(map(_bytes, (q, k, v, out_grad)))
        ctx.cost.add("attention", 2.5 * ctx.flops, moved)
        return (None, *map(torch.empty_like, (q, k, v)), None, None)


class _Norm(torch.autograd.Function):
    """One kernel forward, one backward."""

    @staticmethod
    def forward(ctx: Any, cost: Cost, x: Tensor, weight: Tensor) -> Tensor:
        ctx.cost = cost
        ctx.save_for_backward(x, weight)
        cost.add("rms_norm", 0.0, 2.0 * _bytes(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.cost.add("rms_norm", 0.0, 3.0 * _bytes(x))
        weight_grad = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        return None, torch.empty_like(x), weight_grad


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Count bytes in memory, of what is repeated once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = 1
    for size, stride in sizes:
        count *= size if stride else 1
    return count * tensor.element_size()


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    if name not in PRODUCTS:
        return 0.0
    left = inputs[1] if name == "addmm" else inputs[0]
    return 2.0 * outputs[0].numel() * left.shape[-1]
