"""States of a batch: the right vectors, and nothing else held or left behind."""

import gc
import weakref

import pytest
import tiny
import torch

from torchtune_qwen25vl import generate
from torchtune_qwen25vl.hidden_states import Recorder, hidden_states

WANTED = [
    *("vision.0/mean", "vision/all", "merger/mean", "embed/image_first", "attn.0/image_mean"),
    *("mlp.1/image_all", "layer.-1/query_last", "layer.0/query_mean", "norm/last", "norm/all"),
]


def same(ours, theirs, equal=torch.equal):
    return all(
        len(ours[name]) == len(theirs[name])
        and all(equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))
        for name in ours
    )


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=2e-5, equal_nan=True)


def test_shapes_and_names():
    model, inputs = tiny.model(), tiny.inputs("mixed batch").padded_left()
    states = hidden_states(model, inputs.ours, [*WANTED, "layer.all/last"])
    assert list(states) == [*WANTED, "layer.0/last", "layer.1/last"]
    assert states["vision.0/mean"].shape == (3, 32)
    assert states["norm/last"].shape == (3, 64)
    assert [len(row) for row in states["vision/all"]] == [60, 0, 64]
    assert [len(row) for row in states["mlp.1/image_all"]] == [15, 0, 16]
    assert [len(row) for row in states["norm/all"]] == inputs.attention_mask.sum(-1).tolist()


def test_a_row_without_images_has_none_of_theirs():
    states = hidden_states(tiny.model(), tiny.inputs("mixed batch").ours, WANTED)
    for name in ("vision.0/mean", "merger/mean", "embed/image_first", "attn.0/image_mean"):
        assert states[name][1].isnan().all(), name
        assert states[name][[0, 2]].isfinite().all(), name
    text = hidden_states(tiny.model(), {"tokens": tiny.text(2, 9), "input_pos": line(2, 9)}, WANTED)
    assert text["vision.0/mean"].shape == (2, 32)
    assert text["vision.0/mean"].isnan().all()
    assert [row.shape for row in text["vision/all"]] == [(0, 32)] * 2
    assert text["norm/last"].isfinite().all()


def line(b, s):
    return torch.arange(s).view(1, s, 1).expand(b, s, 3)


def test_a_row_in_a_batch_is_the_row_alone_on_either_side():
    model, inputs = tiny.model(), tiny.inputs("mixed batch")
    alone = [hidden_states(model, inputs.row(k).ours, WANTED) for k in range(3)]
    for batch in (inputs.ours, inputs.padded_left().ours):
        together = hidden_states(model, batch, WANTED)
        for k, row in enumerate(alone):
            for name in WANTED:
                assert close(together[name][k], row[name][0]), name


def test_the_prompt_ends_where_labels_begin():
    inputs = tiny.inputs("mixed batch")
    batch = {**inputs.ours, "labels": inputs.labels}
    states = hidden_states(
        tiny.model(), batch, ["layer.1/all", "layer.1/query_last", "layer.1/last"]
    )
    for row, answer in ((0, 7), (2, 5)):  # tokens of the answers
        every = states["layer.1/all"][row]
        assert torch.equal(states["layer.1/query_last"][row], every[-answer - 1])
        assert torch.equal(states["layer.1/last"][row], every[-1])


def test_the_boundary_of_the_published_scripts():
    """min(T * H * W, seq_len // 2) of the row without padding."""
    inputs = tiny.inputs("mixed batch").padded_left()
    wanted = ["layer.1/image_last", "layer.1/all"]
    states = hidden_states(tiny.model(), inputs.ours, wanted, vision_boundary="halp")
    for row, grid in ((0, (1, 6, 10)), (2, (1, 12, 4))):
        every = states["layer.1/all"][row]
        boundary = min(grid[0] * grid[1] * grid[2], len(every) // 2)
        assert torch.equal(states["layer.1/image_last"][row], every[boundary])
    assert states["layer.1/image_last"][1].isnan().all()
    right = hidden_states(tiny.model(), inputs.ours, wanted)
    assert not torch.equal(right["layer.1/image_last"][0], states["layer.1/image_last"][0])


def test_short_grids_bound_it_first():
    inputs = tiny.inputs("two images")  # the first of 1 x 8 x 8 patches, in a row of 200 and more
    tokens = torch.cat([inputs.tokens, tiny.text(1, 200)], 1)
    last = int(inputs.positions.max()) + 1
    more = (last + torch.arange(200)).view(1, -1, 1).expand(1, 200, 3)
    batch = {**inputs.ours, "tokens": tokens, "input_pos": torch.cat([inputs.positions, more], 1)}
    wanted = ["layer.0/image_last", "layer.0/all"]
    states = hidden_states(tiny.model(), batch, wanted, vision_boundary="halp")
    assert torch.equal(states["layer.0/image_last"][0], states["layer.0/all"][0][64])


@pytest.mark.parametrize("mask", ["dense", "lengths", "none"])
def test_packed_samples_are_refused(mask):
    tokens = tiny.text(1, 12)
    batch = {"tokens": tokens, "input_pos": torch.cat([line(1, 7), line(1, 5)], 1)}
    owner = torch.tensor([[0] * 7 + [1] * 5])
    masks = {
        "dense": (owner[:, None] == owner[..., None]).tril(),
        "lengths": torch.tensor([7, 5]),
        "none": None,
    }
    with pytest.raises(ValueError, match="each row must hold one sample"):
        hidden_states(tiny.model(), {**batch, "mask": masks[mask]}, ["norm/last"])


def test_positions_on_one_axis_are_refused():
    batch = {"tokens": tiny.text(1, 5), "input_pos": torch.arange(5)[None]}
    with pytest.raises(ValueError, match="positions on three axes"):
        hidden_states(tiny.model(), batch, ["norm/last"])


def test_generate_shows_the_same_states_and_gives_the_same_tokens():
    model, inputs = tiny.model(), tiny.inputs("mixed batch").padded_left()
    recorder = Recorder(model, inputs.ours, WANTED)
    told = generate(model, inputs.ours, max_new_tokens=6, observe=recorder).tokens
    assert torch.equal(told, generate(model, inputs.ours, max_new_tokens=6).tokens)
    assert same(recorder.states(), hidden_states(model, inputs.ours, WANTED), close)


def test_bf16_means_are_rounded_once():
    model = tiny.model().bfloat16()
    inputs = tiny.inputs("image")
    states = hidden_states(model, inputs.ours, ["layer.0/image_mean", "layer.0/image_all"])
    assert states["layer.0/image_mean"].dtype == torch.bfloat16
    exact = states["layer.0/image_all"][0].double().mean(0)
    assert torch.equal(states["layer.0/image_mean"][0], exact.bfloat16())


def test_whole_sequences_are_not_held():
    """While layer k runs, nothing of the layers before is alive but what was taken."""
    model, inputs = tiny.model(num_layers=5), tiny.inputs("image")
    recorder = Recorder(model, inputs.ours, ["layer.all/query_last", "layer.all/image_mean"])
    seen, most = [], 0

    def observe(site, x, *, index=None):
        nonlocal most
        recorder(site, x, index=index)
        if site == "layer":
            seen.append(weakref.ref(x))
            gc.collect()
            most = max(most, sum(ref() is not None for ref in seen))

    with torch.no_grad():
        model(**inputs.ours, output="hidden", observe=observe)
    assert len(seen) == 5
    assert most <= 2
    taken = recorder.states()
    assert sum(t.untyped_storage().nbytes() for t in taken.values()) == 10 * 64 * 4


def test_nothing_is_left_behind():
    model, inputs = tiny.model().train(), tiny.inputs("image")

    def observe(site, x, *, index=None):
        raise ValueError("seen enough")

    with pytest.raises(ValueError, match="seen enough"):
        generate(model, inputs.ours, max_new_tokens=2, observe=observe)
    assert model.training
    hidden_states(model, inputs.ours, WANTED)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_compiled_layer_is_observed_too():
    model, inputs = tiny.model(), tiny.inputs("image")
    right = hidden_states(model, inputs.ours, WANTED)
    for layer in model.layers:
        layer.compile(backend="eager")
    assert same(hidden_states(model, inputs.ours, WANTED), right)


def test_the_last_layer_is_whole_where_somebody_looks():
    """Without an observer it computes the tokens that are asked for alone."""
    model, inputs = tiny.model(), tiny.inputs("image")
    rows = torch.zeros_like(inputs.tokens, dtype=torch.bool)
    rows[:, -1] = True
    seen = {}

    def observe(site, x, *, index=None):
        seen[site, index] = x.shape

    logits = model(**inputs.ours, output_mask=rows, output="logits", observe=observe)
    assert close(logits, model(**inputs.ours, output_mask=rows, output="logits"))
    assert seen["layer", 1] == seen["norm", None] == (1, 51, 64)
