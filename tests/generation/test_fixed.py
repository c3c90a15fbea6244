"""Decoding in fixed shapes: the tokens are those of decoding in growing ones, in one graph.

A GPU records what these tests run on the CPU.
"""

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from parity.inputs import LAYOUTS, make_inputs
from torchtune_qwen25vl.generation import _fixed, _generate, _places, _running, generate
from torchtune_qwen25vl.generation._fixed import ASK_EVERY, FixedCache, FixedStep

MIXED = "mixed batch"  # an image; text alone; two images
NEW = 4 * ASK_EVERY + 3


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def fix_shapes(monkeypatch):
    """Decode in fixed shapes, as on a GPU."""
    for module in (_generate, _places, _running):
        monkeypatch.setattr(module, "fixes_shapes", lambda model: True)


@pytest.fixture
def fixed(monkeypatch):
    fix_shapes(monkeypatch)


def prompts(layout, seed=0):
    return make_inputs(LAYOUTS[layout], tiny.IDS, seed=seed).padded_left().ours


def continued(model, batch, **options):
    return generate(model, batch, max_new_tokens=NEW, **options)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}], ids=["greedy", "penalty"])
@pytest.mark.parametrize("layout", [MIXED, "image", "video", "image and video"])
def test_tokens_are_those_of_growing_shapes(model, layout, options, monkeypatch):
    batch = prompts(layout)
    expected = continued(model, batch, **options)
    # one row ends early, one late, and the last one never
    stops = {int(expected.tokens[0, 2]), int(expected.tokens[-1, NEW - 5])}
    ended = continued(model, batch, stop_tokens=list(stops), **options)
    fix_shapes(monkeypatch)
    assert torch.equal(continued(model, batch, **options).tokens, expected.tokens)
    again = continued(model, batch, stop_tokens=list(stops), **options)
    assert again.lengths == ended.lengths
    assert again.finish_reasons == ended.finish_reasons
    assert torch.equal(again.tokens, ended.tokens)


def test_drawn_tokens_are_those_of_growing_shapes(model, monkeypatch):
    def drawn():
        chance = torch.Generator().manual_seed(3)
        return continued(model, prompts(MIXED), temperature=0.8, top_k=30, generator=chance).tokens

    expected = drawn()
    fix_shapes(monkeypatch)
    assert torch.equal(drawn(), expected)


@pytest.mark.parametrize("fault", ["a column late", "padding seen"])
def test_the_comparison_sees(model, fault, fixed, monkeypatch):
    batch = prompts(MIXED)
    right = continued(model, batch).tokens
    if fault == "a column late":
        call = FixedStep.__call__
        monkeypatch.setattr(
            FixedStep,
            "__call__",
            lambda self, tokens, positions, columns: call(self, tokens, positions, columns + 1),
        )
    else:
        made = FixedStep.__init__
        monkeypatch.setattr(
            FixedStep,
            "__init__",
            lambda self, model, keys, values, real=None: made(self, model, keys, values),
        )
    assert not torch.equal(continued(model, batch).tokens, right)


def test_the_host_looks_every_few_tokens(model, fixed, monkeypatch):
    batch = prompts(MIXED)
    tokens = continued(model, batch).tokens
    stops = [int(token) for token in tokens[:, 1]]  # all rows end with the second token
    steps = []
    call = FixedStep.__call__
    monkeypatch.setattr(
        FixedStep, "__call__", lambda self, *given: steps.append(1) or call(self, *given)
    )
    said = continued(model, batch, stop_tokens=stops)
    assert max(said.lengths) <= 2
    assert said.tokens.shape[1] == max(said.lengths)
    assert len(steps) == ASK_EVERY
    steps.clear()
    shown = []
    continued(model, batch, stop_tokens=stops, on_token=shown.append)
    assert len(shown) == max(said.lengths)  # who is shown each token is shown none behind the end
    assert len(steps) == max(said.lengths) - 1


def test_a_step_is_one_graph_and_never_compiled_again(model, fixed, monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    decode = FixedStep.decode
    compiled = torch.compile(decode, backend="eager", fullgraph=True, dynamic=False)
    expected = continued(model, prompts(MIXED)).tokens
    monkeypatch.setattr(FixedStep, "decode", lambda self: compiled(self))
    assert torch.equal(continued(model, prompts(MIXED)).tokens, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_growing_step_is_compiled_again_and_again(model):
    """The control: what the test above counts is there to be counted."""
    torch._dynamo.reset()
    counters.clear()
    attend = torch.compile(lambda keys: keys.sum(2), backend="eager", dynamic=False)
    for width in range(4, 8):
        attend(torch.zeros(1, 2, width, 8))
    assert counters["stats"]["unique_graphs"] == 4


def test_a_cache_writes_each_row_in_its_own_column():
    keys, values = torch.zeros(2, 3, 2, 6, 4).unbind()
    columns = torch.tensor([4, 0, 2])
    cache = FixedCache(keys, values, columns)
    new = torch.randn(3, 2, 1, 4), torch.randn(3, 2, 1, 4)
    for held, written in zip(cache.update(*new), new, strict=True):
        for row, column in enumerate(columns.tolist()):
            assert torch.equal(held[row, :, column], written[row, :, 0])
        assert (held != 0).sum() == 3 * 2 * 4


def test_a_step_is_recorded_once_it_pays(model, monkeypatch):
    """After a few tokens, and once: short answers go without."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    recorded = []

    def record(step):
        recorded.append(len(taken))
        return step

    monkeypatch.setattr(_fixed, "recorded", record)
    places = _places.Places(model)
    places.reserve(2, 64)
    step, taken = places.fixed_step(), []
    for column in range(_fixed.RECORD_AFTER + 3):
        tokens = torch.tensor([5, 6]).as_subclass(OnGPU)
        with torch.no_grad():
            step(tokens, torch.full((2,), column), torch.full((2,), column))
        taken.append(column)
    assert recorded == [_fixed.RECORD_AFTER]


def test_what_cannot_be_recorded_is_run_as_it_is():
    """Without a GPU nothing can be recorded."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which records the step")
    step = torch.ones
    with pytest.warns(UserWarning, match="decoded without a CUDA graph, and slower: "):
        assert _fixed.recorded(step) is step
