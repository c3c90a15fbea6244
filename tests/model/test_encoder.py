"""The vision encoder: theirs, and who may see whom."""

import itertools
import math

import pytest
import tiny
import torch
from torchtune.modules import MultiHeadAttention, TransformerSelfAttentionLayer

from parity import reference
from parity.inputs import LAYOUTS
from parity.trace import inputs_for, ours_like, trace_ours, trace_theirs
from torchtune_qwen25vl.model import _encoder
from torchtune_qwen25vl.model._encoder import make_segments

GRID = torch.tensor([[1, 10, 14]])  # windows of 64 + 48, 16 + 12 patches


def encoder(**options):
    return tiny.model(**options).vision


def patches(count, seed=0):
    return torch.randn(count, 1176, generator=torch.Generator().manual_seed(seed))


def changed(encode, grid, patch):
    """The units whose embedding changes with one patch."""
    pixel_values = patches(int(grid.prod(-1).sum()))
    with torch.no_grad():
        before = encode(pixel_values, grid)
        pixel_values[patch] += 1
        return (encode(pixel_values, grid) != before).any(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_theirs(layout):
    inputs, theirs = inputs_for(layout, "tiny"), trace_theirs("tiny", layout)
    model = ours_like(reference.model("tiny"))
    ours = trace_ours(model, inputs)
    for mine, their in zip(ours.vision_layers, theirs.vision_layers, strict=True):
        assert (mine - their).abs().max() <= 1e-5 * their.abs().max()
    assert (ours.encoder - theirs.encoder).abs().max() <= 1e-5 * theirs.encoder.abs().max()
    model.vision.window_size = 56
    wrong = trace_ours(model, inputs).encoder
    assert (wrong - theirs.encoder).abs().max() > 1e-3 * theirs.encoder.abs().max()


def test_a_patch_is_seen_in_its_window_only():
    windows_only = encoder(full_attn_indices=())
    # 5 x 7 units in windows of 4 x 4; the patch lies in unit 9, in the second row of the first
    assert changed(windows_only, GRID, 4 * 9 + 2) == [
        *(0, 1, 2, 3),
        *(7, 8, 9, 10),
        *(14, 15, 16, 17),
        *(21, 22, 23, 24),
    ]
    assert changed(windows_only, GRID, 4 * 34) == [32, 33, 34]  # the corner window


def test_a_patch_is_seen_in_its_frame_but_in_no_other_frame_or_image():
    grid = torch.tensor([[1, 4, 4], [3, 4, 6], [1, 4, 4]])
    full = encoder(full_attn_indices=(1,))
    assert changed(full, grid, 16 + 24 + 5) == list(range(10, 16))  # the video's second frame


def test_images_in_a_batch_are_encoded_as_alone():
    grids = [[1, 10, 14], [2, 4, 6], [1, 20, 8]]
    pieces = [patches(t * h * w, seed) for seed, (t, h, w) in enumerate(grids)]
    vision = encoder()
    with torch.no_grad():
        together = vision(torch.cat(pieces), torch.tensor(grids))
        alone = [vision(p, torch.tensor([g])) for p, g in zip(pieces, grids, strict=True)]
    assert (together - torch.cat(alone)).abs().max() < 2e-6
    assert (together[:35] - together[-40:-5]).abs().max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouping_by_length_changes_nothing(layout, monkeypatch):
    inputs, vision = tiny.inputs(layout), encoder(full_attn_indices=(0,))
    run = []
    attend = _encoder._attend

    def counted(q, k, v, segments):
        run.append(len(segments.runs))
        assert sum(count * length for count, length in segments.runs) == len(q)
        return attend(q, k, v, segments)

    def gradients_and_output():
        vision.zero_grad()
        out = vision(inputs.pixel_values, inputs.grid_thw)
        out.square().mean().backward()
        return [out, *(p.grad.clone() for p in vision.parameters())]

    monkeypatch.setattr(_encoder, "MOVED", 0)
    in_order = gradients_and_output()
    monkeypatch.setattr(_encoder, "_attend", counted)
    monkeypatch.setattr(_encoder, "MOVED", math.inf)
    by_length = gradients_and_output()
    for one, other in zip(in_order, by_length, strict=True):
        assert torch.equal(one, other)
    lengths = {h * w for _, h, w in inputs.grid_thw.tolist()}
    assert run[0] == len(lengths)  # full attention: one call for each size of frame
    assert run[1] <= 9


def test_windows_have_at_most_nine_lengths(monkeypatch):
    monkeypatch.setattr(_encoder, "MOVED", math.inf)
    grids = [[1, 2 * h, 2 * w] for h, w in itertools.product(range(1, 14), repeat=2)]
    order, lengths = _encoder.window_order(
        grids, spatial_merge_size=2, window_size=112, patch_size=14
    )
    segments = make_segments(lengths, torch.zeros(4 * len(order), 1), embed_dim=1)
    assert len(segments.runs) == 9
    assert torch.equal(segments.order[segments.inverse_order], torch.arange(4 * len(order)))


def test_patches_are_moved_where_that_is_cheap():
    rotation = torch.arange(22.0).view(-1, 1)
    in_order = make_segments([4, 4, 2, 4, 8], rotation, embed_dim=1 + _encoder.MOVED // 22)
    assert in_order.order is None
    assert in_order.runs == [(2, 4), (1, 2), (1, 4), (1, 8)]
    assert make_segments([12, 4, 4, 2], rotation, embed_dim=1).order is None  # nothing to save
    moved = make_segments([4, 12, 4, 2], rotation, embed_dim=_encoder.MOVED // 22)
    assert moved.runs == [(1, 2), (2, 4), (1, 12)]
    assert moved.order.tolist() == [20, 21, *range(4), *range(16, 20), *range(4, 16)]
    assert torch.equal(moved.rotation, rotation)


@pytest.mark.parametrize(
    ("count", "grid", "message"),
    [
        (139, [[1, 10, 14]], "describes 140 patches but pixel_values holds 139"),
        (280, [[1, 10, 14]], "describes 140 patches"),
        (140, [[1, 7, 20]], "multiples of 2"),
    ],
)
def test_grids_must_describe_the_patches(count, grid, message):
    with pytest.raises(ValueError, match=message):
        encoder()(patches(count), torch.tensor(grid))


def test_pixels_are_cast_to_the_weights():
    vision = encoder().to(torch.bfloat16)
    out = vision(patches(140), GRID)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_layers_are_what_torchtunes_policies_look_for():
    vision = encoder()
    assert all(isinstance(layer, TransformerSelfAttentionLayer) for layer in vision.layers)
    assert not any(isinstance(m, MultiHeadAttention) for m in vision.modules())
    for layer in vision.layers:
        layer.compile(backend="no such backend")  # would fail at the first call
    assert vision(patches(140), GRID).shape == (35, 64)


def test_every_parameter_gets_a_gradient():
    vision = encoder()
    vision(patches(140), GRID).square().mean().backward()
    for name, parameter in vision.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
