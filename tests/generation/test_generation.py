"""Generation against transformers token for token, and against the model's own full forward."""

import dataclasses

import pytest
import tiny
import torch
import torchtune.generation
from torch.distributed.fsdp import fully_shard

from parity import reference, trace
from parity.inputs import LAYOUTS, make_inputs
from torchtune_qwen25vl._position_ids import mrope_position_ids
from torchtune_qwen25vl.generation import _generate
from torchtune_qwen25vl.generation._cache import make_caches
from torchtune_qwen25vl.generation._generate import (
    PromptedModel,
    decode_one_token,
    generate,
    prefill,
)

MIXED = "mixed batch"  # an image; text alone; two images
LOGITS_TOLERANCE = 2e-5  # four times the fp32 noise of these models


def random_pair(seed):
    theirs = reference.random_model("tiny", seed)
    return theirs, trace.ours_like(theirs)


def prompts(layout=MIXED, seed=0):
    return make_inputs(LAYOUTS[layout], tiny.IDS, seed=seed).padded_left()


def extended(inputs, tokens):
    """Arguments of a full forward over the prompts and these tokens; positions from the ids."""
    tokens = torch.cat((inputs.tokens, tokens), dim=1)
    kept = torch.ones_like(tokens)
    kept[:, : inputs.tokens.shape[1]] = inputs.attention_mask
    video = torch.tensor(inputs.is_video, dtype=torch.bool)
    positions = mrope_position_ids(
        tokens,
        inputs.grid_thw[~video],
        inputs.grid_thw[video],
        inputs.seconds,
        attention_mask=kept,
        image_token_id=tiny.IDS["image_token_id"],
        video_token_id=tiny.IDS["video_token_id"],
    )
    return dataclasses.replace(inputs, tokens=tokens, attention_mask=kept, positions=positions).ours


@torch.no_grad()
def assert_same_tokens(ours, theirs, model, inputs):
    """Equality; where it fails, how close the two likeliest tokens were tells a tie from a bug."""
    if not torch.equal(ours, theirs):
        row, step = (ours != theirs).nonzero()[0].tolist()
        logits = model(**extended(inputs, ours))[row, inputs.tokens.shape[1] - 1 + step]
        best, second = logits.topk(2).values.tolist()
        pytest.fail(f"row {row} differs at token {step}, where top1 - top2 is {best - second:.1e}")


@pytest.mark.parametrize("seed", range(20))
def test_greedy_tokens_equal_transformers_in_a_batch_and_alone(seed):
    theirs, model = random_pair(seed)
    inputs = prompts(seed=seed)
    expected = reference.greedy(theirs, inputs, 64)
    batch = generate(model, inputs.ours, max_new_tokens=64).tokens
    assert_same_tokens(batch, expected, model, inputs)
    index = seed % len(expected)
    alone = inputs.row(index)
    single = generate(model, alone.ours, max_new_tokens=64).tokens
    assert_same_tokens(single, expected[index : index + 1], model, alone)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layout", ["image", "two images", "video", "image and video"])
def test_greedy_tokens_equal_transformers_with(layout, seed):
    theirs, model = random_pair(seed)
    inputs = prompts(layout, seed)
    expected = reference.greedy(theirs, inputs, 64)
    tokens = generate(model, inputs.ours, max_new_tokens=64).tokens
    assert_same_tokens(tokens, expected, model, inputs)


@torch.no_grad()
def cached_logits(model, inputs, tokens, first_position):
    """Logits after the prompt and after each of these tokens [b, n], through the caches."""
    b, s = inputs.tokens.shape
    n = tokens.shape[1]
    attended = torch.cat((inputs.attention_mask.bool(), torch.ones(b, n, dtype=torch.bool)), dim=1)
    with _generate.evaluating(model):
        caches = make_caches(model, b, s + n)
        steps = [prefill(model, inputs.ours, caches)]
        for k in range(n):
            position = first_position + k
            logits = decode_one_token(
                model, tokens[:, k], position, attended[:, : s + k + 1], caches
            )
            steps.append(logits)
    return torch.stack(steps, dim=1)  # [b, 1 + n, v]


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_cached_equals_full_forward(layout):
    _, model = random_pair(0)
    inputs = prompts(layout)
    s = inputs.tokens.shape[1]
    tokens = tiny.text(len(inputs.tokens), 12)
    with torch.no_grad():
        full = model(**extended(inputs, tokens))[:, s - 1 :]
    right = inputs.positions.amax((1, 2)) + 1
    cached = cached_logits(model, inputs, tokens, right)
    assert float((cached - full).abs().max()) < LOGITS_TOLERANCE
    cache_index = torch.full_like(right, s)  # the control: media that took no room
    wrong = cached_logits(model, inputs, tokens, cache_index)
    assert float((wrong[:, 1:] - full[:, 1:]).abs().max()) > 10 * LOGITS_TOLERANCE


def test_images_are_encoded_once_and_one_position_projected():
    model, inputs = tiny.model(), prompts()
    seen = []
    model.vision.register_forward_hook(lambda *_: seen.append("vision"))
    model.output.register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    generate(model, inputs.ours, max_new_tokens=4)
    one_token_a_row = len(inputs.tokens) * tiny.SIZES["embed_dim"]
    assert seen == ["vision"] + 4 * [one_token_a_row]


def test_stop_tokens_end_each_row_on_its_own():
    theirs, model = random_pair(3)
    inputs = prompts(seed=3)
    free = generate(model, inputs.ours, max_new_tokens=24)
    assert free.lengths == [24, 24, 24]
    assert free.finish_reasons == ["length"] * 3
    stops = [int(free.tokens[0, 4]), int(free.tokens[1, 9])]
    ended = generate(model, inputs.ours, max_new_tokens=24, stop_tokens=stops)
    expected = reference.generate(theirs, inputs, 24, do_sample=False, eos_token_id=stops)
    for row, (length, reason) in enumerate(zip(ended.lengths, ended.finish_reasons, strict=True)):
        tokens = free.tokens[row].tolist()
        first = min((tokens.index(stop) for stop in stops if stop in tokens), default=None)
        assert (reason, length) == (("length", 24) if first is None else ("stop", first + 1))
        assert ended.tokens[row, :length].tolist() == tokens[:length]
        assert set(ended.tokens[row, length:].tolist()) <= {tokens[length - 1]}
        assert ended.tokens[row, :length].tolist() == expected[row, :length].tolist()
    assert ended.lengths[0] <= 5
    assert ended.lengths[1] <= 10
    alone = inputs.row(0).ours
    assert generate(model, alone, max_new_tokens=24, stop_tokens=stops).tokens.shape == (1, 5)


def test_callback_sees_every_step():
    model, seen = tiny.model(), []
    result = generate(model, prompts().ours, max_new_tokens=5, on_token=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), result.tokens)


def state(model):
    names = ("num_output_chunks", "output_hidden_states")
    caches = [(layer.attn.kv_cache, layer.attn.cache_enabled) for layer in model.layers]
    sizes = [cache.size for cache, _ in caches if cache is not None]
    training = [module.training for module in model.modules()]
    return [getattr(model, name) for name in names], caches, sizes, training


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("caches", [False, True])
def test_the_model_is_left_as_found(caches, fails):
    model, inputs = tiny.model().train(), prompts("image")
    model.vision.eval()
    model.output_hidden_states = [1]
    model.set_num_output_chunks(2)
    if caches:
        model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    before = state(model)

    def stop(tokens):
        if fails:
            raise KeyboardInterrupt

    try:
        result = generate(model, inputs.ours, max_new_tokens=3, on_token=stop)
        assert torch.equal(result.tokens, generate(tiny.model(), inputs.ours, max_new_tokens=3)[0])
    except KeyboardInterrupt:
        assert fails
    assert state(model) == before


def test_tokens_can_be_trained_on():
    model, inputs = tiny.model(), prompts("image")
    tokens = generate(model, inputs.ours, max_new_tokens=3).tokens
    model(tokens).sum().backward()
    assert model.tok_embeddings.weight.grad is not None


def test_bf16_model():
    model, inputs = tiny.model().bfloat16(), prompts()
    logits = cached_logits(model, inputs, tiny.text(3, 4), inputs.positions.amax((1, 2)) + 1)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        full = model(**extended(inputs, tiny.text(3, 4)))[:, inputs.tokens.shape[1] - 1 :]
    assert float((logits - full).norm() / full.norm()) < 0.03


def torchtune_tokens(model, inputs, *, cached, n=16, **options):
    """What torchtune's own generate adds, given a model with its prompt."""
    b, s = inputs.tokens.shape
    if cached:
        model.setup_caches(b, torch.float32, decoder_max_seq_len=s + n)
    padded = inputs.attention_mask == 0
    tokens = inputs.tokens.masked_fill(padded, 1007)
    prompted = PromptedModel(model, {**inputs.ours, "tokens": tokens})
    result, _ = torchtune.generation.generate(
        prompted, tokens, max_generated_tokens=n, pad_id=1007, top_k=1, **options
    )
    return result[:, s:]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layout", ["image", "video", MIXED])
def test_torchtunes_generate_gives_the_same_tokens(layout, cached):
    model, inputs = tiny.model(), prompts(layout)
    expected = generate(model, inputs.ours, max_new_tokens=16).tokens
    assert torch.equal(torchtune_tokens(model, inputs, cached=cached), expected)


@pytest.mark.parametrize("layout", ["image", "text", MIXED])
@pytest.mark.parametrize("name", ["image_token_id", "video_token_id"])
def test_a_generated_placeholder_is_a_token_as_any_other(layout, name):
    model = tiny.model()
    inputs = prompts(MIXED).row(1) if layout == "text" else prompts(layout)
    with torch.no_grad():  # the placeholder is the likeliest token where the first one was
        first = generate(model, inputs.ours, max_new_tokens=1).tokens
        model.output.weight[tiny.IDS[name]] = 2 * model.output.weight[first[0, 0]]
    expected = generate(model, inputs.ours, max_new_tokens=16).tokens
    assert (expected == tiny.IDS[name]).any()
    for cached in (False, True):
        assert torch.equal(torchtune_tokens(model, inputs, cached=cached), expected)


def test_torchtunes_generate_without_the_adapter_is_wrong():
    """The control: the model alone gets no image, and says so."""
    inputs = prompts("image")
    with pytest.raises(ValueError, match="placeholders"):
        torchtune.generation.generate(tiny.model(), inputs.tokens, max_generated_tokens=1)


def test_a_sharded_model_generates_and_trains_on(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, inputs = tiny.model(), prompts("image")
        expected = generate(model, inputs.ours, max_new_tokens=4).tokens
        for layer in model.layers:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        assert torch.equal(generate(model, inputs.ours, max_new_tokens=4).tokens, expected)
        model(**inputs.ours).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", ["one image too many", "one image too few"])
def test_images_that_do_not_fit_are_refused(change):
    batch = prompts().ours
    vision = batch["encoder_input"]["vision"]
    grid_thw, values = vision["grid_thw"], vision["pixel_values"]
    if change == "one image too many":
        extra = int(grid_thw[0].prod())
        vision = {
            "grid_thw": torch.cat((grid_thw, grid_thw[:1])),
            "pixel_values": torch.cat((values, values[:extra])),
        }
    else:
        last = int(grid_thw[-1].prod())
        vision = {"grid_thw": grid_thw[:-1], "pixel_values": values[:-last]}
    with pytest.raises(ValueError, match="placeholders"):
        generate(
            random_pair(0)[1], {**batch, "encoder_input": {"vision": vision}}, max_new_tokens=2
        )
