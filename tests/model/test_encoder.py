"""The vision encoder: theirs, and who may see whom."""

import itertools

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from torchtune.modules import MultiHeadAttention, TransformerSelfAttentionLayer

from parity import reference
from parity.inputs import LAYOUTS
from parity.trace import inputs_for, ours_like, trace_ours, trace_theirs
from torchtune_qwen25vl.model import _encoder
from torchtune_qwen25vl.model._encoder import VisionEncoder, arrange

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


SIZES = {"spatial_merge_size": 2, "window_size": 112, "patch_size": 14}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sorting_windows_changes_nothing(layout, monkeypatch):
    inputs, vision = tiny.inputs(layout), encoder(full_attn_indices=(0,))

    def gradients_and_output():
        vision.zero_grad()
        out = vision(inputs.pixel_values, inputs.grid_thw)
        out.square().mean().backward()
        return [out, *(p.grad.clone() for p in vision.parameters())]

    output, *gradients = gradients_and_output()
    in_order = arrange_unsorted(inputs.grid_thw.tolist())
    monkeypatch.setattr(VisionEncoder, "arrange", lambda self, grids: in_order)
    expected, *right = gradients_and_output()
    assert torch.equal(output, expected)
    for one, other in zip(gradients, right, strict=True):  # sums over patches in another order
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def arrange_unsorted(grids):
    order, lengths = _encoder.window_order(grids, **SIZES)
    return _encoder.Arrangement(order, _encoder.runs_of(lengths), arrange(grids, **SIZES).frames)


def test_a_frame_has_at_most_four_runs_of_windows():
    for h, w in itertools.product(range(1, 14), repeat=2):
        grids = [[2, 2 * h, 2 * w], [1, 4, 4]]
        order, windows, frames = arrange(grids, **SIZES)
        assert torch.equal(order.sort().values, torch.arange(2 * h * w + 4))
        assert sum(count * length for count, length in windows) == 8 * h * w + 16
        assert len(windows) <= 4 + 4 + 1
        assert frames == ([(2, 4 * h * w), (1, 16)] if h * w != 4 else [(3, 16)])


def test_a_frames_windows_stay_in_it():
    grids = [[1, 10, 14], [2, 4, 20]]
    order, windows, _ = arrange(grids, **SIZES)
    assert windows == [(1, 64), (1, 48), (1, 16), (1, 12), *[(2, 32), (1, 16)] * 2]
    frames = order.split([35, 20, 20])
    for first, frame in zip((0, 35, 55), frames, strict=True):
        assert torch.equal(frame.sort().values, first + torch.arange(len(frame)))


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


@pytest.mark.parametrize("learns", [False, True])
def test_compiled_layers_take_any_number_of_patches(learns):
    """Nine batches, no two of one length: one graph before attention and one behind it."""
    plain, compiled = encoder(), encoder()
    torch._dynamo.reset()
    counters.clear()
    for layer in compiled.layers:
        layer.compile(backend="eager")
    grids = [[[1, 2 * h, 2 * w]] for h, w in ((2, 3), (5, 7), (4, 4), (3, 9), (6, 6))]
    grids += [[[1, 4, 6], [1, 10, 14]], [[2, 4, 4]], [[1, 6, 10], [3, 4, 6]], [[1, 20, 2]]]
    for grid in map(torch.tensor, grids):
        pixel_values = patches(int(grid.prod(-1).sum()))
        with torch.set_grad_enabled(learns):
            assert torch.equal(compiled(pixel_values, grid), plain(pixel_values, grid))
    assert counters["stats"]["unique_graphs"] == 2


def test_every_parameter_gets_a_gradient():
    vision = encoder()
    vision(patches(140), GRID).square().mean().backward()
    for name, parameter in vision.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
