"""Pieces that a GPU runs compiled: the same numbers, few graphs, and a way on where they fail."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torchtune import modules

from torchtune_qwen25vl.model import _fused
from torchtune_qwen25vl.model._fused import FeedForward, swiglu
from torchtune_qwen25vl.model._positional_embeddings import VisionRotaryEmbedding, rotate

PIECES = (rotate, swiglu)


def compiled(piece, monkeypatch):
    """The piece as a GPU runs it, compiled by what needs no compiler of C++."""
    compile_anywhere = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_anywhere)
    return _fused._compiled(piece.__wrapped__)


def test_a_rotation_is_compiled_for_any_number_of_patches_and_heads(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    turn = compiled(rotate, monkeypatch)
    rotary = VisionRotaryEmbedding(16)
    for patches, heads in ((4, 2), (7, 3), (12, 2), (31, 5), (8, 6), (100, 4)):
        rotation = rotary(torch.randint(9, (patches, 2)))
        x = torch.randn(patches, heads, 16, dtype=torch.bfloat16)
        assert torch.equal(turn(x, rotation), rotate(x, rotation))
        assert not torch.equal(turn(x, rotation.flip(0)), rotate(x, rotation))  # the control
    assert counters["stats"]["unique_graphs"] <= 2  # 2 heads are taken for a size of their own


def test_a_gate_is_torchtunes():
    torch.manual_seed(0)
    linears = [torch.nn.Linear(8, 20), torch.nn.Linear(20, 8), torch.nn.Linear(8, 20)]
    names = ("gate_proj", "down_proj", "up_proj")
    named = dict(zip(names, linears, strict=True))
    ours, stock = FeedForward(**named), modules.FeedForward(**named)
    x = torch.randn(3, 5, 8)
    assert torch.equal(ours(x), stock(x))
    gate, up = torch.randn(2, 6).unbind()
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)
    assert not torch.equal(swiglu(gate, up), swiglu(up, gate))  # the control


@pytest.mark.parametrize("piece", PIECES)
def test_without_a_compiler_a_piece_runs_as_written_and_says_so(piece, monkeypatch):
    def broken(plain, **options):
        def run(*tensors):
            calls.append(1)
            raise RuntimeError("no compiler\nand much more")

        return run

    calls = []
    monkeypatch.setattr(torch, "compile", broken)
    run = _fused._compiled(piece.__wrapped__)
    tensors = {
        rotate: (torch.randn(3, 2, 8), torch.randn(3, 2, 8)),
        swiglu: (torch.randn(3), torch.randn(3)),
    }[piece]
    with pytest.warns(UserWarning, match=f"{piece.__name__} runs uncompiled.*: no compiler$"):
        assert torch.equal(run(*tensors), piece(*tensors))
    assert torch.equal(run(*tensors), piece(*tensors))
    assert len(calls) == 1  # it is not tried again


def test_an_error_of_the_piece_itself_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda plain, **options: lambda *given: plain(*given))
    run = _fused._compiled(swiglu.__wrapped__)
    with (
        pytest.raises(RuntimeError, match="must match"),
        pytest.warns(UserWarning, match="runs uncompiled"),
    ):
        run(torch.randn(3), torch.randn(4))


def test_memory_that_runs_out_is_no_reason_to_go_on_uncompiled(monkeypatch):
    def out_of_memory(*tensors):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "compile", lambda plain, **options: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        _fused._compiled(swiglu.__wrapped__)(torch.randn(3), torch.randn(3))
