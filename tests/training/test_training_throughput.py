"""Speed and operations."""

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from training_samples import Transform, sample

from torchtune_qwen25vl.training import StepCollate, Throughput, summed_loss
from torchtune_qwen25vl.training._step import output_weight
from torchtune_qwen25vl.training._throughput import FlopCounter, peak_tflops

LORA = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4}
CPU = torch.device("cpu")


def data(*kinds):
    return StepCollate(Transform.pad_id, batch_size=1, pack_to=None)(
        [sample(kind, seed) for seed, kind in enumerate(kinds)]
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vision_trainable": "frozen"},
        {"vision_trainable": "frozen", "merger_trainable": "frozen"},
        {"vision_trainable": "frozen", "decoder_trainable": "frozen"},
        {**LORA, "vision_trainable": "frozen", "decoder_trainable": "lora"},
    ],
)
def test_operations_are_those_that_torch_counts(options):
    model = tiny.model(**options).train()
    ours, step = FlopCounter(model), data("image", "two images", "video")
    counted = 0.0
    for batch, lengths, grids, labels in zip(*step, strict=True):
        counted += ours.count(lengths, grids, labels)
        # torch counts attention to what is masked too, and not the in-place addmm_ of our loss
        counted += ours._decoder_attention(lengths) * (3 if ours.flows["decoder"] else 1)
        output = output_weight(model)
        counted -= 2 * labels * output.numel() * output.requires_grad
        with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
            summed_loss(model, batch).backward()
        counted -= theirs.get_total_flops()
    assert counted == 0


def test_checkpointing_counts_nothing_twice():
    model = tiny.model()
    before = FlopCounter(model).count([40], [[1, 4, 4]], 10)
    training.set_activation_checkpointing(model, {TransformerSelfAttentionLayer})
    assert FlopCounter(model).count([40], [[1, 4, 4]], 10) == before


def test_more_of_anything_takes_more_operations():
    counter = FlopCounter(tiny.model())
    one = counter.count([40], [[1, 4, 4]], 10)
    assert counter.count([20, 20], [[1, 4, 4]], 10) < one  # two samples do not see each other
    assert counter.count([40], [[1, 4, 8]], 10) > one
    assert counter.count([40], [[1, 4, 4]], 11) > one
    frozen = FlopCounter(tiny.model(vision_trainable="frozen"))
    assert frozen.count([40], [[1, 4, 4]], 10) < one


def test_a_report_counts_since_the_last_one(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    throughput = Throughput(tiny.model(), CPU, tflops=1e-3)
    step = data("image", "two images", "text")

    def slow():
        clock[0] += 0.5
        yield step

    assert throughput.waiting(slow()) is step
    throughput.add(step)
    clock[0] = 102.0
    report = throughput.report()
    assert report["tokens_per_second"] == sum(map(sum, step.lengths)) / 2
    assert report["visual_tokens_per_second"] == (60 + 16 + 24) / 4 / 2
    assert report["images_per_second"] == 3 / 2
    assert report["data_wait"] == 0.5 / 2
    assert 0 < report["peak_memory_gib"] < 1000
    operations = sum(map(throughput.flops.count, step.lengths, step.grids, step.labels))
    assert report["mfu"] == pytest.approx(operations / 2 / 1e9)
    clock[0] = 103.0
    assert throughput.report()["tokens_per_second"] == 0


def test_no_mfu_without_a_known_peak():
    throughput = Throughput(tiny.model(), CPU, tflops=None)
    assert "mfu" not in throughput.report()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip under a name that begins alike
        ("NVIDIA H100 PCIe MIG 1g.10gb", None),  # a part of a card
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_peak_is_known_by_the_cards_exact_name(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_tflops(torch.device("cuda")) == peak
    assert peak_tflops(torch.device("cpu")) is None
