"""Rotary embeddings against theirs, and against what a rotation must do."""

import pytest
import torch

from parity import reference
from torchtune_qwen25vl.model._positional_embeddings import (
    MultimodalRotaryEmbedding,
    VisionRotaryEmbedding,
    rotate,
)

HEAD_DIM, SECTION = 128, [16, 24, 24]


@pytest.fixture
def rope():
    return MultimodalRotaryEmbedding(HEAD_DIM, 1e6, SECTION)


@pytest.fixture
def x():
    return torch.randn(2, 5, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))


def turned(rope, x, input_pos=None):
    return rotate(x, rope(input_pos, x.shape[:2]))


def positions(b=2, s=5, high=128_000):
    return torch.randint(0, high, (b, s, 3), generator=torch.Generator().manual_seed(1))


def test_angles_equal_theirs_bit_for_bit():
    theirs = reference.model("tiny").model.language_model.rotary_emb
    ours = MultimodalRotaryEmbedding(16, 1e6, [2, 3, 3])
    ids = positions()
    cos, sin = theirs(torch.zeros(1), ids.permute(2, 0, 1))  # [b, s, h_d], both halves alike
    signed = torch.cat((-sin[..., :8], sin[..., 8:]), dim=-1)
    expected = torch.stack((cos, signed), dim=-2)
    assert torch.equal(ours(ids, (2, 5)), expected)
    assert not torch.equal(ours(ids.flip(-1), (2, 5)), expected)


def test_each_frequency_follows_its_axis(rope):
    start = rope(torch.zeros(1, 1, 3, dtype=torch.int64), (1, 1))
    for axis, frequencies in enumerate((slice(0, 16), slice(16, 40), slice(40, 64))):
        moved = torch.zeros(1, 1, 3, dtype=torch.int64)
        moved[..., axis] = 7
        changed = (rope(moved, (1, 1)) != start).any(-2).flatten()  # [h_d]
        first, second = changed.chunk(2)
        assert torch.equal(first, second)
        assert first[frequencies].all()
        assert first.sum() == len(range(64)[frequencies])


def test_all_shapes_for_text_are_the_same_positions(rope, x):
    expected = turned(rope, x)
    arange = torch.arange(5)
    for input_pos in (
        arange,
        arange[None],
        arange.expand(2, 5),
        arange.view(1, 5, 1).expand(2, 5, 3),
    ):
        assert torch.equal(turned(rope, x, input_pos), expected)
    last = torch.tensor([4, 4])
    assert torch.equal(turned(rope, x[:, 4:], last), expected[:, 4:])
    assert torch.equal(turned(rope, x[:, 4:], last[:1]), expected[:, 4:])
    assert not torch.equal(turned(rope, x, arange + 1), expected)


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 5, 2), (5, 2), (2,), (10,), (2, 5, 3, 1, 1)])
def test_other_shapes_are_refused(rope, shape):
    with pytest.raises(ValueError, match="input_pos must be"):
        rope(torch.zeros(shape, dtype=torch.int64), (2, 5))


def test_only_differences_of_positions_matter(rope, x):
    ids, far = positions(high=100), torch.tensor([30, 20, 10])

    def scores(moved_queries, moved_keys):
        queries = turned(rope, x, ids + moved_queries)
        keys = turned(rope, x.flip(0), ids.flip(1) + moved_keys)
        return (queries * keys).sum(-1)

    assert (scores(0, 0) - scores(far, far)).abs().max() < 1e-3
    assert (scores(0, 0) - scores(0, far)).abs().max() > 1


def test_rotation_is_done_in_fp32(rope, x):
    ids = positions()
    exact = turned(rope, x.bfloat16().float(), ids)
    rounded = turned(rope, x.bfloat16(), ids)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize(
    "move",
    [
        lambda rope: rope.to(torch.bfloat16),
        lambda rope: rope.half().double(),
        lambda rope: torch.nn.Sequential(rope).to(torch.bfloat16)[0],
        lambda rope: rope.to("meta").to_empty(device="cpu"),
    ],
)
def test_frequencies_survive_casts_and_moves(rope, move):
    expected = rope.inv_freq.clone()
    moved = move(rope)
    assert moved.inv_freq.dtype == torch.float32
    assert torch.equal(moved.inv_freq, expected)
    assert not moved.state_dict()


def test_built_on_meta_as_distributed_recipes_do(rope, x):
    with torch.device("meta"):
        built = MultimodalRotaryEmbedding(HEAD_DIM, 1e6, SECTION)
    assert built.inv_freq.is_meta
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cpu"):
            built.rope_init()
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(turned(built, x), turned(rope, x))


def test_sections_must_fill_the_head():
    with pytest.raises(ValueError, match="half the head dim"):
        MultimodalRotaryEmbedding(64, 1e6, SECTION)


def test_patches_turn_by_row_then_column():
    rotary = VisionRotaryEmbedding(80)
    rotation = rotary(torch.tensor([[0, 0], [3, 0], [0, 5]]))[..., 40:]  # [p, 2, 40], second half
    frequencies = 10_000.0 ** -(torch.arange(20, dtype=torch.float64) / 20)
    rows, columns = rotation.split(20, dim=-1)
    for turned, still, angles in (
        (rows[1], columns[1], 3 * frequencies),
        (columns[2], rows[2], 5 * frequencies),
    ):
        assert (turned - torch.stack((angles.cos(), angles.sin()))).abs().max() < 1e-6
        assert torch.equal(still, torch.tensor([[1.0], [0.0]]).expand(2, 20))


def test_coordinates_turn_with_those_half_a_head_away():
    # cosines and signed sines that turn the first pair by 90 degrees
    quarter = torch.tensor([[0.0, 1.0, 0.0, 1.0], [-1.0, 0.0, 1.0, 0.0]])
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(rotate(x, quarter), torch.tensor([[-3.0, 2.0, 1.0, 4.0]]))
