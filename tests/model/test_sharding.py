"""The model on two processes: FSDP2 and tensor parallelism as torchtune's recipes set them up."""

import inspect
import traceback
from functools import partial

import on_ranks
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torchtune import training
from torchtune.models.llama3 import base_llama_tp_plan


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What went wrong in each check, run one after the other on two gloo processes."""
    folder = tmp_path_factory.mktemp("outcome")
    on_ranks.succeed(2, lambda: _run_checks(folder))
    return lambda check: [(folder / f"{check}.{rank}").read_text() for rank in range(2)]


def _run_checks(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name, check in CHECKS.items():
        try:
            check(rank)
            (folder / f"{name}.{rank}").write_text("")
        except AssertionError:
            (folder / f"{name}.{rank}").write_text(traceback.format_exc())
    dist.destroy_process_group()
    return 0


def batches():
    """One batch with images and one without, as two ranks may draw them."""
    inputs, tokens = tiny.inputs("mixed batch"), tiny.text(3, 60)
    return [(inputs.ours, inputs.labels), ({"tokens": tokens}, tokens)]


def loss_of(model, batch):
    kwargs, labels = batch
    logits = model(**kwargs)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def _train_sharded(rank, *, options):
    """FSDP2: gradients and evaluation on unlike batches equal those of one process."""
    full = tiny.model(**options).train()
    sum(loss_of(full, batch) / 2 for batch in batches()).backward()
    with torch.device("meta"):
        sharded = tiny.qwen2_5_vl(**{**tiny.SIZES, **options}).train()
    condition = partial(training.get_shard_conditions, names_to_match=None)
    training.shard_model(
        sharded,
        [condition],
        cpu_offload=False,
        dp_mesh=init_device_mesh("cpu", (2,)),
    )
    with torch.device("cpu"):
        for module in sharded.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    training.load_from_full_model_state_dict(
        sharded, full.state_dict(), torch.device("cpu"), strict=True
    )
    training.validate_no_params_on_meta_device(sharded)
    loss_of(sharded, batches()[rank]).backward()
    expected = dict(full.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert parameter.requires_grad == expected[name].requires_grad, name
        if not parameter.requires_grad:
            continue
        difference = parameter.grad.full_tensor() - expected[name].grad
        assert difference.abs().max() < 1e-6, name
        assert expected[name].grad.any(), name
    with torch.no_grad():  # as a recipe validates: rank 0 encodes images, rank 1 has none
        kwargs, _ = batches()[rank]
        logits = sharded.eval()(**kwargs)
        assert (logits - full.eval()(**kwargs)).abs().max() < 2e-6


def _tensor_parallel(rank):
    model, inputs = tiny.model(), tiny.inputs("mixed batch")
    with torch.no_grad():
        expected = model(**inputs.ours)
        mesh = init_device_mesh("cpu", (2,))
        # the development version's plan needs the model, and shards sequences while training
        of_dev = "inference" in inspect.signature(base_llama_tp_plan).parameters
        plan = base_llama_tp_plan(model, inference=True) if of_dev else base_llama_tp_plan()
        parallelize_module(training.prepare_mha_for_tp(model, mesh), mesh, plan)
        assert model.layers[0].attn.num_heads == 2
        assert model.layers[0].attn.q_proj.weight.to_local().shape == (32, 64)
        assert (model(**inputs.ours) - expected).abs().max() < 2e-6


CHECKS = {
    "everything trained": partial(_train_sharded, options={}),
    "frozen encoder, tied": partial(
        _train_sharded, options={"vision_trainable": "frozen", "tie_word_embeddings": True}
    ),
    "tensor parallel": _tensor_parallel,
}


@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(outcome, check):
    assert outcome(check) == ["", ""]
