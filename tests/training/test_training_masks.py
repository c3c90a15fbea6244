"""Masks of packed rows in blocks: each block says what the dense mask does, without making it."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from torchtune_qwen25vl.training._batches import StepBatches, to_device
from torchtune_qwen25vl.training._masks import FLEX_BLOCK, sample_spans, tree_mask

CPU = torch.device("cpu")
ROWS = {  # tokens of each branch of each tree; the first branch is the trunk
    "samples": [[100], [28], [300], [128], [1], [211]],
    "one sample": [[768]],
    "trees": [[200, 40, 50], [9, 300], [169]],
    "long branches": [[130, 300, 338]],
}


def spans(trees, padding=0):
    rows = [
        (t, b) for t, sizes in enumerate(trees) for b, size in enumerate(sizes) for _ in range(size)
    ]
    return torch.tensor([*rows, *[(-1, 0)] * padding])[None]


def dense_of(block):
    """What the blocks alone say: 0 left out, 1 as the function decides, 2 in full."""
    n = block.kv_indices.shape[-1]
    said = torch.zeros(block.kv_indices.shape[0], n, n, dtype=torch.int)
    for value, counts, order in (
        (1, block.kv_num_blocks, block.kv_indices),
        (2, block.full_kv_num_blocks, block.full_kv_indices),
    ):
        for row in range(len(said)):
            for query in range(n):
                said[row, query, order[row, 0, query, : counts[row, 0, query]].long()] += value
    return said


@pytest.mark.parametrize("padding", [0, 200])
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_are_those_of_the_dense_mask(rows, padding):
    made = spans(ROWS[rows], padding)
    made = made[:, : made.shape[1] // FLEX_BLOCK * FLEX_BLOCK]
    s = made.shape[1]
    block, dense = tree_mask(made, flex=True), tree_mask(made, flex=False)
    assert torch.equal(create_mask(block.mask_mod, 1, 1, s, s, device="cpu")[0], dense)
    tiles = dense.unfold(1, FLEX_BLOCK, FLEX_BLOCK).unfold(2, FLEX_BLOCK, FLEX_BLOCK)
    said = dense_of(block)
    assert not tiles.flatten(3).any(-1)[said == 0].any()  # what is left out sees nothing
    assert tiles.flatten(3).all(-1)[said == 2].all()
    assert (said == 2).any()
    if rows in ("samples", "one sample"):  # then not one block more than torch's own
        theirs = create_block_mask(block.mask_mod, 1, None, s, s, device="cpu")
        assert torch.equal(said, dense_of(theirs))
        for name in ("q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(block, name), getattr(theirs, name))


def test_other_branches_of_blocks_of_their_own_are_left_out():
    said = dense_of(tree_mask(spans([[128, 256, 256, 128]]), flex=True))[0]
    assert said.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [2, 1, 0, 0, 0, 0],
        [2, 2, 1, 0, 0, 0],
        [2, 0, 0, 1, 0, 0],
        [2, 0, 0, 2, 1, 0],
        [2, 0, 0, 0, 0, 1],
    ]


def test_packed_rows_get_the_mask_of_their_samples():
    batch = {"tokens": torch.zeros(1, 256, dtype=torch.long)}
    data = StepBatches([batch], [[100, 60]], [[]], [0])
    to_device(data, CPU, mask="flex")
    dense = tree_mask(sample_spans([100, 60, 96], CPU), flex=False)
    owner = torch.arange(3).repeat_interleave(torch.tensor([100, 60, 96]))
    assert torch.equal(dense[0], (owner[:, None] == owner).tril())
    mask = create_mask(batch["mask"].mask_mod, 1, 1, 256, 256, device="cpu")
    assert torch.equal(mask[0], dense)
