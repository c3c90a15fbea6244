"""How fast the port is on a GPU, against transformers on the same weights and inputs."""

import copy
import gc
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from parity import reference
from parity.gpu._equal import sample_of
from parity.gpu._figures import Figure, Sizes, milliseconds, peak_gib
from parity.inputs import Inputs, make_inputs
from parity.stages.quantization import divergence
from parity.trace import ours_like
from torchtune_qwen25vl import Qwen25VL, generate, hf_to_tune, qwen2_5_vl_from_config
from torchtune_qwen25vl.device._choice import Format
from torchtune_qwen25vl.device._loading import empty_four_bit
from torchtune_qwen25vl.generation import Prompt, RunningBatch, Sampling
from torchtune_qwen25vl.generation._cache import make_caches
from torchtune_qwen25vl.generation._forward import prefill
from torchtune_qwen25vl.training import StepCollate, to_device, train_step
from torchtune_qwen25vl.training._throughput import FlopCounter, peak_tflops
from torchtune_qwen25vl.weights import materialize

PLACES = 32  # captions in flight
LENGTHS = (14, 128)  # tokens of captions, drawn evenly
LAST = 64  # tokens of a prompt whose predictions are compared
SAMPLES = 8  # of a training step
LORA: dict[str, Any] = {
    "decoder_trainable": "lora",
    "vision_trainable": "frozen",
    "merger_trainable": "frozen",
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}


def inference(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Tokens, prompts, images and captions of every size."""
    for name in sizes.models:
        theirs = _theirs(name, device)
        ours = ours_like(theirs)
        yield from _tokens(name, ours, theirs, device, sizes)
        yield from _prompts(name, ours, theirs, device, sizes)
        yield _captions(name, ours, device, sizes)
        del ours, theirs
        _release(device)


def _theirs(name: str, device: torch.device) -> Any:
    if device.type == "cpu":
        return copy.deepcopy(reference.random_model(name))
    return reference.sized_model(name, device, torch.bfloat16)


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _tokens(
    name: str, ours: Qwen25VL, theirs: Any, device: torch.device, sizes: Sizes
) -> Iterator[Figure]:
    """Time a token of several rows, and say how fast the weights are read for it."""
    read = sum(p.nbytes for n, p in ours.named_parameters() if not n.startswith("vision."))
    for b in sizes.batches:
        inputs = make_inputs([[256]] * b, reference.IDS).padded_left().to(str(device))

        mine = _each(partial(_continue, ours, inputs), device, sizes)
        their = _each(partial(reference.greedy, theirs, inputs), device, sizes)
        note = f"weights at {read / mine / 1e6:.0f} GB/s"
        yield Figure(f"{name}, a token of {b}", mine, theirs=their, note=note)
    inputs = make_inputs([[256]], reference.IDS).padded_left().to(str(device))
    if device.type == "cuda" and name == sizes.models[0]:
        static = partial(
            reference.generate,
            theirs,
            inputs,
            cache_implementation="static",
            do_sample=False,
        )
        mine = _each(lambda n: static(max_new_tokens=n), device, sizes)
        yield Figure(f"{name}, a token of 1, theirs static and compiled", mine, note="theirs alone")


def _continue(model: Qwen25VL, inputs: Inputs, count: int) -> None:
    generate(model, inputs.ours, max_new_tokens=count)


def _each(continued: Callable[[int], object], device: torch.device, sizes: Sizes) -> float:
    """Return the time of a token: of a long answer less a short one."""
    counts = 2, 2 + sizes.new_tokens
    short, long = (milliseconds(partial(continued, count), device) for count in counts)
    return (long - short) / sizes.new_tokens


@torch.no_grad()
def _prompts(
    name: str, ours: Qwen25VL, theirs: Any, device: torch.device, sizes: Sizes
) -> Iterator[Figure]:
    _, h, w = sizes.image
    placeholders = h * w // 4
    for b in (1, 8):
        layout: list[list[int | tuple]] = [[4, sizes.image, sizes.text - 4]] * b
        inputs = make_inputs(layout, reference.IDS).to(str(device))
        media = inputs.ours["encoder_input"]["vision"]
        media["grid_thw"] = media["grid_thw"].cpu()
        mine = milliseconds(partial(ours.vision, **media), device)
        their = milliseconds(partial(reference.encode, theirs, inputs), device)
        note = f"{1e3 * b / mine:.1f} images/s"
        yield Figure(
            f"{name}, {b} images of {placeholders} placeholders", mine, theirs=their, note=note
        )
        batch = {**inputs.ours, "mask": None, "encoder_input": {"vision": media}}

        mine = milliseconds(partial(_read, ours, batch), device)
        their = milliseconds(partial(reference.greedy, theirs, inputs, 1), device)
        length = inputs.tokens.shape[1]
        yield Figure(f"{name}, {b} prompts of {length} tokens with it", mine, theirs=their)


def _read(model: Qwen25VL, batch: dict[str, Any]) -> None:
    prefill(model, batch, make_caches(model, *batch["tokens"].shape))


def _captions(name: str, ours: Qwen25VL, device: torch.device, sizes: Sizes) -> Figure:
    """Caption photos of several sizes whose pixels are ready, as the recipe does."""
    rng = random.Random(0)
    _, h, w = sizes.image
    prompts = []
    for index in range(sizes.photos):
        image = (1, 2 * rng.randint(h // 4, h // 2), 2 * rng.randint(w // 4, w // 2))
        inputs = make_inputs([[12, image, 28]], reference.IDS, seed=index)
        sample = sample_of(inputs)
        length = rng.randint(*LENGTHS) if device.type != "cpu" else rng.randint(2, 6)
        prompts.append(Prompt((index, length), sample))

    def caption() -> None:
        waiting = sorted(prompts, key=lambda prompt: -len(prompt.sample["tokens"]))
        most = max(prompt.question[1] for prompt in prompts)
        running: RunningBatch[tuple[int, int]] = RunningBatch(
            ours, 0, Sampling(), max_new_tokens=most
        )
        while waiting or running.questions:
            free = PLACES - len(running.questions)
            if waiting and (free >= PLACES // 4 or not running.questions):
                running.enter(waiting[:free])
                waiting = waiting[free:]
            running.advance()

    taken = milliseconds(caption, device, repeats=1)
    note = f"{sizes.photos} photos, pixels ready, all answers of the full length"
    return Figure(f"{name}, captions", 1e3 * sizes.photos / taken, "captions/s", note=note)


@torch.no_grad()
def four_bits(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Time tokens and a prompt in bf16, int4 and NF4, and say what 4 bits cost and save."""
    theirs = _theirs(sizes.in_four_bits, device)
    plain, config = ours_like(theirs, dtype=torch.bfloat16), reference.config_dict(theirs)
    layout: list[list[int | tuple]] = [[4, sizes.image, sizes.text - 4]]
    inputs = make_inputs(layout, reference.IDS).to(str(device))
    right = plain(**inputs.ours)[0, -LAST:]
    yield from _times(f"{sizes.in_four_bits} in bf16", plain, inputs, device, sizes)
    for four_bit in get_args(Format):
        work, before = f"{sizes.in_four_bits} in {four_bit}", _allocated(device)
        model = empty_four_bit(config, four_bit)
        materialize(model, plain.state_dict().items(), device=device, dtype=torch.bfloat16)
        note = f"weights {_allocated(device) - before:.2f} GiB"
        yield from _times(work, model.eval(), inputs, device, sizes)
        cost = float(divergence(right, model(**inputs.ours)[0, -LAST:]).mean())
        yield Figure(f"{work}, divergence from bf16", cost, "nats", note=note)
        del model
        _release(device)


def _times(
    work: str, model: Qwen25VL, prompt: Inputs, device: torch.device, sizes: Sizes
) -> Iterator[Figure]:
    for b in sizes.batches:
        inputs = make_inputs([[256]] * b, reference.IDS).padded_left().to(str(device))
        taken = _each(partial(_continue, model, inputs), device, sizes)
        yield Figure(f"{work}, a token of {b}", taken)
    taken = milliseconds(partial(_continue, model, prompt, 1), device)
    yield Figure(f"{work}, a prompt of {prompt.tokens.shape[1]} tokens", taken)


def _allocated(device: torch.device) -> float:
    """Return the GiB that tensors take; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def steps(device: torch.device, sizes: Sizes) -> Iterator[Figure]:
    """Training steps, padded and packed: adapters, and everything; SGD."""
    rng = random.Random(1)
    _, h, w = sizes.image
    layout: list[list[int | tuple]] = []
    for index in range(SAMPLES):
        image = (1, 2 * rng.randint(h // 4, h // 2), 2 * rng.randint(w // 4, w // 2))
        layout.append([30, *([image] if index % 4 else []), rng.randint(40, 250)])
    inputs = make_inputs(layout, reference.IDS)
    for name in sizes.models:
        for kind, tuning in (("LoRA", LORA), ("full", {})):
            yield from _step(f"{name}, a {kind} step", name, tuning, inputs, device)
            _release(device)


def _step(
    work: str, name: str, tuning: dict[str, Any], inputs: Inputs, device: torch.device
) -> Iterator[Figure]:
    theirs = _theirs(name, device).train()
    yield from _our_steps(work, _trained(theirs, tuning).train(), inputs, device)
    _release(device)
    their = _their_step(theirs, tuning, inputs.to(str(device)))
    yield Figure(f"{work}, theirs, padded", milliseconds(their, device), note="theirs alone")
    yield Figure(f"{work}, theirs, memory", peak_gib(their, device), "GiB", note="theirs alone")


def _our_steps(
    work: str, model: Qwen25VL, inputs: Inputs, device: torch.device
) -> Iterator[Figure]:
    samples = [sample_of(inputs.row(row)) for row in range(SAMPLES)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    peak = peak_tflops(device)
    for form, pack_to in (("padded", None), ("packed", inputs.tokens.numel())):
        collate = StepCollate(0, batch_size=SAMPLES, pack_to=pack_to, mask="lengths")
        data = collate(samples)
        to_device(data, device, dtype=model.dtype)
        step = partial(train_step, model, optimizer, data.batches)
        taken, used = milliseconds(step, device), peak_gib(step, device)
        flops = sum(map(FlopCounter(model).count, data.lengths, data.grids, data.labels))
        note = "" if peak is None else f"MFU {flops / taken / peak / 1e9:.0%}"
        yield Figure(f"{work}, {form}", taken, note=note)
        yield Figure(f"{work}, {form}, memory", used, "GiB")


def _trained(theirs: nn.Module, tuning: dict[str, Any]) -> Qwen25VL:
    """Build our model on their weights, with adapters."""
    if not tuning:
        return ours_like(theirs)
    weight = next(theirs.parameters())
    with torch.device("meta"):
        model = qwen2_5_vl_from_config(reference.config_dict(theirs), **tuning)
    model.load_state_dict(hf_to_tune(reference.disk_state_dict(theirs)), strict=False, assign=True)
    for module in model.modules():
        for half in ("lora_a", "lora_b"):
            if hasattr(module, half):
                layer = getattr(module, half).to_empty(device=weight.device).to(weight.dtype)
                nn.init.normal_(layer.weight, std=0.01)
    model.pos_embeddings.to_empty(device=weight.device)
    model.vision.rotary.to_empty(device=weight.device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    return model


def _their_step(model: Any, tuning: dict[str, Any], inputs: Inputs) -> Callable[[], None]:
    """Make a plain loop's step: the model with `labels`, backward, step."""
    model.requires_grad_(not tuning)
    if tuning:
        import peft

        named = r".*(language_model|model)\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
        settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules=named)
        peft.inject_adapter_in_model(settings, model)
        model.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    arguments = reference.forward_kwargs(inputs)

    def step() -> None:
        model(**arguments, labels=inputs.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
