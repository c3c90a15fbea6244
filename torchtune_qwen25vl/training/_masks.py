"""Which tokens of a packed row see which: dense, or in blocks for flex attention.

torch's `create_block_mask` first makes the dense mask, of which several copies are alive at once: a
row of 16,384 tokens takes 2.5 GiB. Here blocks are told from the least and largest number in them.

Shapes: b rows of a batch, s tokens, n = s / FLEX_BLOCK blocks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128  # rows and columns of a block of flex attention


def tree_mask(spans: Tensor, *, flex: bool) -> Any:
    """Make the mask by which a token sees those before it in its own tree: trunk and own branch.

    Padding sees padding.

    Args:
        spans: number of tree and branch of each token, int [b, s, 2]
        flex: whether to make a BlockMask, of whole blocks, in place of bool [b, s, s]
    """
    b, s, _ = spans.shape
    tree, branch = (numbers.contiguous() for numbers in spans.unbind(-1))  # [b, s]

    def sees(row: Any, head: Any, query: Any, key: Any) -> Any:
        same_tree = tree[row, query] == tree[row, key]
        is_trunk, own = branch[row, key] == 0, branch[row, query] == branch[row, key]
        return same_tree & (is_trunk | own) & (key <= query)

    if flex:
        seen, full = _blocks(tree, branch)
        some, all_ = _listed(seen & ~full), _listed(full)
        return BlockMask.from_kv_blocks(
            *some, *all_, BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(s, s)
        )
    rows, index = torch.arange(b, device=spans.device), torch.arange(s, device=spans.device)
    return sees(rows[:, None, None], None, index[:, None], index)  # [b, s, s]


def sample_spans(lengths: list[int], device: torch.device) -> Tensor:
    """Return the spans of a row whose trees are samples without branches, [1, s, 2]."""
    tree = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    return torch.stack((tree, torch.zeros_like(tree)), dim=-1)[None]


def _blocks(tree: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Return which blocks of keys a block of queries may see, and which in full, bool [b, n, n]."""
    (first, last), (low, high) = (_ends(numbers) for numbers in (tree, branch))  # [b, n]
    index = torch.arange(first.shape[1], device=tree.device)
    past, before = index <= index[:, None], index < index[:, None]  # [n, n]

    def query(ends: Tensor) -> Tensor:
        return ends[:, :, None]

    def key(ends: Tensor) -> Tensor:
        return ends[:, None]

    overlap = (key(first) <= query(last)) & (query(first) <= key(last))
    alike = (low == high) & (first == last)  # one branch of one tree
    other = query(alike) & key(alike) & (query(low) != key(low)) & (key(low) != 0)
    own = query(alike) & key(alike) & (query(low) == key(low))
    trunk = query(first == last) & key(first == last) & (key(high) == 0)
    seen = past & overlap & ~other
    return seen, before & overlap & (own | trunk)


def _ends(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest number of each block, from [b, s] twice [b, n]."""
    least, most = numbers.unflatten(1, (-1, FLEX_BLOCK)).aminmax(dim=-1)
    return least, most


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, [b, 1, n], and which first."""
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[:, None], order[:, None]  # each with an axis of heads
