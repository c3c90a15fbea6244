"""What a model is run on and in, decided from what torch says."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend

from torchtune_qwen25vl import device
from torchtune_qwen25vl.device import _machine
from torchtune_qwen25vl.device._choice import downgrades
from torchtune_qwen25vl.device._machine import Machine
from torchtune_qwen25vl.device._memory import (
    Footprint,
    is_quantised,
    pixel_budget,
    token_budget,
    weights_bytes,
)

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
GPU = Machine(
    torch.device("cuda", 0),
    "GPU",
    24 * 10**9,
    20 * 10**9,
    bf16=True,
    flash=True,
    versions="torch x",
    int4=True,
)
OLD = replace(GPU, name="old GPU", bf16=False, flash=False, int4=False)
SMALL = replace(GPU, name="small GPU", total=8 * 10**9, free=7 * 10**9)
CPU = replace(GPU, device=torch.device("cpu"), name="CPU", bf16=False, flash=False)
AMD = replace(CPU, onednn=True)
NEW_CPU = replace(CPU, bf16=True)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("QWEN_FORCE_4BIT", raising=False)


@pytest.mark.parametrize(
    ("machine", "stored", "options", "dtype", "four_bit"),
    [
        (GPU, {BF16}, {}, BF16, None),
        (OLD, {BF16}, {}, FP32, None),
        (CPU, {BF16}, {}, FP32, None),
        (GPU, {FP32}, {}, FP32, None),  # bf16 would lose digits
        (GPU, {FP16}, {}, FP32, None),
        (GPU, {BF16, FP32}, {}, FP32, None),
        (GPU, {FP32}, {"dtype": "bf16"}, BF16, None),
        (GPU, {BF16}, {"dtype": "fp32"}, FP32, None),
        (SMALL, {BF16}, {}, BF16, "nf4"),
        (SMALL, {BF16}, {"four_bit": "off"}, BF16, None),
        (GPU, {BF16}, {"four_bit": "on"}, BF16, "nf4"),
        (GPU, {BF16}, {"four_bit": "nf4"}, BF16, "nf4"),
        (GPU, {BF16}, {"four_bit": "int4"}, BF16, "int4"),
        (CPU, {BF16}, {"four_bit": "on"}, FP32, "nf4"),
        (NEW_CPU, {BF16}, {"four_bit": "on"}, BF16, "int4"),  # measured to be the faster one
        (NEW_CPU, {BF16}, {"four_bit": "nf4"}, BF16, "nf4"),
        (NEW_CPU, {FP32}, {"four_bit": "on"}, FP32, "nf4"),
        (replace(NEW_CPU, int4=False), {BF16}, {"four_bit": "on"}, BF16, "nf4"),
        (replace(CPU, total=8 * 10**9), {BF16}, {}, FP32, None),
    ],
)
def test_choices(machine, stored, options, dtype, four_bit):
    choice = device.choose(machine, stored, **options)
    assert (choice.dtype, choice.four_bit) == (dtype, four_bit)
    assert choice.device == machine.device


@pytest.mark.parametrize(
    ("machine", "options", "kernels", "said"),
    [
        (CPU, {}, "torch", "torch kernels: "),
        (AMD, {}, "onednn", "as the CPU is AMD's"),
        (AMD, {"cpu_kernels": "torch"}, "torch", "cpu_kernels torch was asked for"),
        (CPU, {"cpu_kernels": "onednn"}, "onednn", "cpu_kernels onednn was asked for"),
        (GPU, {}, "torch", "cuda:0"),
    ],
)
def test_kernels_of_a_cpu(machine, options, kernels, said):
    choice = device.choose(machine, {FP32}, **options)
    assert choice.cpu_kernels == kernels
    assert said in str(choice)
    assert ("kernels" in str(choice)) == (machine is not GPU)


@pytest.mark.parametrize(("vendor", "known"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_vendor_of_the_cpu_decides(vendor, known, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(_machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert device.look("cpu").onednn == known
    monkeypatch.setattr(_machine, "CPU_INFO", tmp_path / "none")  # as on Windows
    monkeypatch.setattr("platform.processor", lambda: f"AMD64 Family 25, {vendor}")
    assert device.look("cpu").onednn == known


def test_never_float16():
    for machine in (GPU, OLD, SMALL, CPU):
        for stored in ({BF16}, {FP16}, {FP32}):
            choice = device.choose(machine, stored)
            for candidate in (choice, *downgrades(choice, machine)):
                assert candidate.dtype != FP16


def test_the_environment_can_force_four_bits(monkeypatch):
    monkeypatch.setenv("QWEN_FORCE_4BIT", "1")
    choice = device.choose(GPU, {BF16})
    assert choice.four_bit == "nf4"
    assert "QWEN_FORCE_4BIT" in str(choice)
    assert device.choose(GPU, {BF16}, four_bit="off").four_bit is None


@pytest.mark.parametrize(
    ("machine", "four_bit", "price"),
    [
        (GPU, "nf4", "NF4 takes about 5 to 10 times .* (estimated)"),
        (CPU, "nf4", "NF4 takes 17 to 42 times .* (measured on one CPU)"),
        (GPU, "int4", "int4 takes about 0.4 times .*, and longer for a prompt (estimated)"),
        (NEW_CPU, "int4", "int4 takes 0.3 to 0.9 times .* 1.8 for a prompt (measured on one CPU)"),
    ],
)
def test_what_four_bits_cost_is_said(machine, four_bit, price):
    pattern = price.replace("(", r"\(").replace(")", r"\)")
    choice = device.choose(machine, {BF16}, four_bit=four_bit)
    assert re.search(pattern, str(choice))
    assert choice.format == four_bit
    plain = device.choose(machine, {BF16}, four_bit="off")
    assert not re.search("NF4|int4", str(plain))


@pytest.mark.parametrize(
    ("machine", "formats"),
    [
        (GPU, ["float32", "bfloat16", "nf4"]),
        (NEW_CPU, ["float32", "bfloat16", "int4", "nf4"]),  # NF4 takes a little less
        (CPU, ["float32", "nf4"]),
    ],
)
def test_what_does_not_fit_gets_coarser_and_coarser(machine, formats):
    finest = device.choose(machine, {FP32})
    found = [finest, *downgrades(finest, machine)]
    assert [choice.format for choice in found] == formats
    for choice in found:
        if choice.four_bit:
            assert f"{device._choice.WORDS[choice.four_bit]} takes" in str(choice)


def test_the_reasons_are_one_line():
    for machine, words in ((OLD, "no bf16"), (SMALL, "8.0 GB"), (GPU, "bf16 as in the files")):
        line = str(device.choose(machine, {BF16}))
        assert words in line
        assert machine.name in line
        assert "\n" not in line


@pytest.mark.parametrize(
    ("machine", "options", "message"),
    [
        (OLD, {"dtype": "bf16"}, "old GPU has no bf16"),
        (CPU, {"attention": "flash"}, "'flash' is not possible on CPU"),
        (GPU, {"attention": "flash", "dtype": "fp32"}, "in float32; use sdpa"),
        (GPU, {"dtype": "fp16"}, "dtype is one of auto, bf16, fp32"),
        (GPU, {"attention": "sage"}, "attention is one of"),
        (GPU, {"four_bit": "maybe"}, "four_bit is one of auto, on, off, nf4, int4"),
        (OLD, {"four_bit": "int4"}, "torch x has no kernels for int4 on old GPU: set four_bit=nf4"),
        (CPU, {"four_bit": "int4"}, "in bf16, and this is float32: set four_bit=nf4"),
        (GPU, {"four_bit": "int4", "dtype": "fp32"}, "set dtype=bf16 or four_bit=nf4"),
        (CPU, {"cpu_kernels": "mkl"}, "cpu_kernels is one of auto, torch, onednn"),
        (GPU, {"cpu_kernels": "onednn"}, "onednn is for a CPU, the model goes to cuda:0"),
    ],
)
def test_what_cannot_be_is_refused(machine, options, message):
    with pytest.raises(ValueError, match=message):
        device.choose(machine, {BF16}, **options)


@pytest.mark.parametrize("attention", ["sdpa", "flash", "eager"])
def test_attention_kernels(attention):
    choice = device.choose(GPU, {BF16}, attention=attention)
    with device.attention_kernels(choice):
        inside = torch.nn.attention._cur_sdpa_kernel_backends()
    assert (SDPBackend.FLASH_ATTENTION in inside) == (attention != "eager")
    assert len(torch.nn.attention._cur_sdpa_kernel_backends()) > 2  # as it was


def test_this_machine_says_what_it_is():
    machine = device.look("cpu")
    assert machine.device == torch.device("cpu")
    assert 0 < machine.free <= machine.total
    assert machine.int4
    assert torch.__version__ in machine.versions
    if not torch.accelerator.is_available():
        found = device.look()
        assert found == replace(machine, free=found.free)


def test_a_container_has_less_memory_than_its_host(tmp_path, monkeypatch):
    monkeypatch.setattr(_machine, "CGROUP", tmp_path)
    host = device.look("cpu")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert device.look("cpu").total == host.total
    (tmp_path / "memory.max").write_text("5000\n")
    assert (device.look("cpu").free, device.look("cpu").total) == (4000, 5000)
    assert (device.look("cpu", ranks=4).free, device.look("cpu", ranks=4).total) == (1000, 1250)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here")
def test_a_missing_accelerator_is_no_cpu():
    for name in ("cuda", "cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"cannot use {name}, it finds no accelerator"):
            device.look(name)


FOOTPRINT = Footprint(token=80_000, image_token=150_000, bytes_per_value=2, logits=2_400_000)


def test_the_pixel_budget_grows_with_memory_in_whole_tokens():
    memory = range(0, 10**9, 10**7)
    budgets = [pixel_budget(free, FOOTPRINT, text_tokens=300) for free in memory]
    assert budgets == sorted(budgets)
    assert budgets[0] == 256 * 784
    assert budgets[-1] == 1280 * 784
    assert len(set(budgets)) > 5
    for free, budget in zip(memory, budgets, strict=True):
        tokens, rest = divmod(budget, 784)
        assert rest == 0
        if tokens > 256:
            assert FOOTPRINT.batch(1, tokens, 300) <= 0.9 * free
        if tokens < 1280:
            assert FOOTPRINT.batch(1, tokens + 1, 300) > 0.9 * free


def test_the_pixel_budget_never_goes_below_min_pixels():
    assert pixel_budget(0, FOOTPRINT, text_tokens=9, min_pixels=3136) == 3136
    large = 2000 * 784
    assert pixel_budget(10**12, FOOTPRINT, text_tokens=9, min_pixels=large) == large


def test_the_token_budget_is_whole_rows_that_fit():
    row = 500 + 300
    for free in (0, 10**8, 10**9, 10**10):
        options = {"max_pixels": 500 * 784, "text_tokens": 300}
        rows, rest = divmod(token_budget(free, FOOTPRINT, **options), row)
        assert rest == 0
        assert rows >= 1
        assert rows == 1 or FOOTPRINT.batch(rows, 500, 300) <= 0.9 * free
        assert FOOTPRINT.batch(rows + 1, 500, 300) > 0.9 * free


def test_bytes_of_published_sizes():
    """7B: 8,292,166,656 parameters; 4 bits leave vision, embedding and output as they are."""
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (18944, 3584),
        "visual.blocks.0.mlp.up_proj.weight": (3420, 1280),
        "lm_head.weight": (152064, 3584),
        "model.layers.0.self_attn.q_proj.bias": (3584,),
    }
    numbers = [18944 * 3584, 3420 * 1280, 152064 * 3584, 3584]
    assert weights_bytes(shapes, BF16) == 2 * sum(numbers)
    for four_bit, least, most in (("nf4", 0.5, 0.52), ("int4", 0.5625, 0.5625)):
        quantised = weights_bytes(shapes, BF16, four_bit=four_bit) - 2 * sum(numbers[1:])
        assert least * numbers[0] <= quantised <= most * numbers[0]
    assert [is_quantised(name) for name in shapes] == [True, False, False, False]
    assert is_quantised("model.language_model.layers.3.self_attn.o_proj.weight")
    assert not is_quantised("model.visual.blocks.0.mlp.gate_proj.weight")


def test_out_of_memory_is_told_from_other_errors():
    assert device.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert device.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert device.is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert not device.is_out_of_memory(RuntimeError("device-side assert triggered"))
