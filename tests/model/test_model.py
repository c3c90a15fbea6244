"""The whole model: theirs, its rows, its caches, and what torchtune does to it."""

import copy
import warnings

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torchtune.generation import generate
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.common_utils import disable_kv_cache, local_kv_cache
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.training import set_activation_checkpointing

from parity import reference
from parity.inputs import LAYOUTS
from parity.trace import inputs_for, ours_like, trace_theirs
from torchtune_qwen25vl.model._decoder_layer import RMSNorm


@pytest.fixture(scope="module")
def model():
    return tiny.model()


def loss_of(model, inputs):
    logits = model(**inputs.ours)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), inputs.labels[:, 1:].flatten())


def gradients(model, inputs):
    """Every gradient of the loss on a batch, by name."""
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def encoder_input(inputs):
    return inputs.ours["encoder_input"]


@pytest.mark.parametrize("name", ["tiny", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_theirs(name, layout):
    inputs = inputs_for(layout, name)
    theirs, ours = trace_theirs(name, layout).logits, ours_like(reference.model(name))
    kept = inputs.attention_mask.bool()
    with torch.no_grad():
        assert (ours(**inputs.ours) - theirs)[kept].abs().max() < 2e-5
        swapped = {**inputs.ours, "input_pos": inputs.positions.flip(-1)}
        assert (ours(**swapped) - theirs)[kept].abs().max() > 1e-2


def test_rows_are_as_alone(model):
    inputs = tiny.inputs("mixed batch")  # one image, text only, two images
    pieces = inputs.pixel_values.split(inputs.grid_thw.prod(-1).tolist())
    with torch.no_grad():
        together = model(**inputs.ours)
        for row, images in enumerate([slice(0, 1), slice(0, 0), slice(1, 3)]):
            length = int(inputs.attention_mask[row].sum())
            alone = {
                "tokens": inputs.tokens[row : row + 1, :length],
                "input_pos": inputs.positions[row : row + 1, :length],
            }
            if inputs.grid_thw[images].numel():
                vision = {
                    "pixel_values": torch.cat(pieces[images]),
                    "grid_thw": inputs.grid_thw[images],
                }
                alone["encoder_input"] = {"vision": vision}
            assert (model(**alone)[0] - together[row, :length]).abs().max() < 2e-6
            other = together[(row + 1) % 3, :length]
            assert (model(**alone)[0] - other).abs().max() > 1e-2


def test_text_needs_no_positions(model):
    tokens = tiny.text(2, 7)
    with torch.no_grad():
        expected = model(tokens)
        arange = torch.arange(7)
        for input_pos in (arange, arange.expand(2, 7), arange.view(1, 7, 1).expand(2, 7, 3)):
            assert torch.equal(model(tokens, input_pos=input_pos), expected)


def test_nothing_is_remembered_between_calls(model):
    first, second = tiny.inputs("image", seed=1), tiny.inputs("video", seed=2)
    with torch.no_grad():
        expected = model(**first.ours)
        model(**second.ours)
        assert torch.equal(model(**first.ours), expected)


@pytest.mark.parametrize("change", [1, -1])
def test_placeholders_are_counted(model, change):
    inputs = tiny.inputs("image")
    tokens = inputs.tokens.clone()
    free = (tokens < 1000).nonzero()[0] if change == 1 else (tokens == 1001).nonzero()[0]
    tokens[tuple(free)] = 1001 if change == 1 else 5
    with pytest.raises(ValueError, match=rf"{35 + change} placeholders .* returned 35 embeddings"):
        model(tokens, input_pos=inputs.positions, encoder_input=encoder_input(inputs))


def test_placeholders_need_media_and_media_need_three_axes(model):
    inputs = tiny.inputs("image")
    with pytest.raises(ValueError, match=r"35 placeholders .* returned 0"):
        model(inputs.tokens, input_pos=inputs.positions)
    for input_pos in (None, inputs.positions[..., 0]):
        with pytest.raises(ValueError, match="three axes"):
            model(inputs.tokens, input_pos=input_pos, encoder_input=encoder_input(inputs))


def test_a_generated_token_may_be_anything(model):
    assert model(torch.tensor([[1001]]), input_pos=torch.tensor([[[9, 9, 9]]])).isfinite().all()


def test_too_long_is_refused(model):
    with pytest.raises(ValueError, match="4097 > 4096"):
        model(tiny.text(1, 4097))
    assert tiny.model(max_seq_len=6)(tiny.text(1, 6)).shape == (1, 6, 1024)


def test_a_batch_without_media_goes_through_the_encoder_where_ranks_share_it():
    model, tokens = tiny.model().train(), tiny.text(2, 6)
    expected = model(tokens)
    expected.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision.parameters())
    model.zero_grad()
    logits = model(tokens, encode_absent=True)
    assert torch.equal(logits, expected)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() != name.startswith("vision."), name


@pytest.mark.parametrize("said", [None, True, False])
def test_a_sharded_model_encodes_absent_media_unless_told_not_to(said, monkeypatch, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, encoded = tiny.model(), []
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        model.vision.register_forward_hook(lambda *_: encoded.append(1))
        model(tiny.text(2, 6), encode_absent=said)
        assert len(encoded) == (said is not False)
    finally:
        torch.distributed.destroy_process_group()


def test_every_parameter_gets_a_gradient(model):
    grads = gradients(model, tiny.inputs())
    for name, _ in model.named_parameters():
        assert grads[name].isfinite().all(), name
        assert grads[name].any(), name


def test_hidden_states_as_stock(model):
    inputs = tiny.inputs()
    kept = []
    handles = [
        layer.register_forward_hook(lambda _, __, out: kept.append(out)) for layer in model.layers
    ]
    model.output_hidden_states = [1, 2]
    try:
        first, last, logits = model(**inputs.ours)
    finally:
        model.output_hidden_states = []
        for handle in handles:
            handle.remove()
    assert torch.equal(first, kept[0])
    assert torch.equal(last, kept[1])
    assert torch.equal(logits, model(**inputs.ours))


@pytest.mark.parametrize("tied", [False, True])
def test_every_way_to_the_loss(tied):
    model, inputs = tiny.model(tie_word_embeddings=tied), tiny.inputs()
    labels = F.pad(inputs.labels[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        logits = model(**inputs.ours)
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        wanted = labels != -100
        some = model(**inputs.ours, output_mask=wanted)
        assert some.shape == (wanted.sum(), 1024)
        assert (some - logits[wanted]).abs().max() < 1e-5
        model.output_hidden_states = [1, 2]  # what the last layer returns is wanted whole
        *_, last, some = model(**inputs.ours, output_mask=wanted)
        model.output_hidden_states = []
        assert torch.equal(model.unembed(last), logits)
        assert (some - logits[wanted]).abs().max() < 1e-5
        hidden = model(**inputs.ours, output="hidden")
        assert hidden.shape == (*inputs.tokens.shape, 64)
        assert torch.equal(model.output(hidden).float(), logits)
        chunked = CEWithChunkedOutputLoss(num_output_chunks=4)
        model.set_num_output_chunks(4)
        chunks = model(**inputs.ours)
        assert isinstance(chunks, list)
        model.output_hidden_states = [1]
        assert torch.equal(model(**inputs.ours, output="logits"), logits)
        assert torch.equal(model(**inputs.ours, output="hidden"), hidden)
        assert abs(chunked(chunks, labels) - expected) < 1e-5
    assert ("output.weight" in model.state_dict()) == (not tied)


def test_the_last_mlp_sees_wanted_tokens_only(model):
    inputs, rows = tiny.inputs(), []
    wanted = inputs.labels != -100
    handles = [
        layer.mlp.register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
        for layer in model.layers
    ]
    with torch.no_grad():
        model(**inputs.ours, output_mask=wanted)
    for handle in handles:
        handle.remove()
    assert rows == [wanted.numel()] * (len(model.layers) - 1) + [wanted.sum()]


@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing_keeps_gradients(tied):
    model, inputs = tiny.model(tie_word_embeddings=tied), tiny.inputs()
    expected = gradients(model, inputs)
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    names = [name for name, _ in model.named_modules() if name.endswith("_wrapped_module")]
    assert len(names) == len(model.layers) + len(model.vision.layers)
    actual = gradients(model, inputs)
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_a_decoder_layer_compiles_without_graph_break(model):
    inputs, layer = tiny.inputs("image"), copy.deepcopy(model.layers[0])
    rotation = model.pos_embeddings(inputs.positions, inputs.tokens.shape)
    h = torch.randn(1, inputs.tokens.shape[1], 64, generator=torch.Generator().manual_seed(0))
    expected = layer(h, rotation=rotation)
    layer.compile(backend="aot_eager", fullgraph=True)
    assert (layer(h, rotation=rotation) - expected).abs().max() < 1e-5


def left_padded(inputs):
    """The rows of a batch moved to the right end, with mask [b, s, s] and new order of rows."""
    s = inputs.tokens.shape[1]
    pads = s - inputs.attention_mask.sum(1)  # [b]
    index = (torch.arange(s) - pads[:, None]).clamp(min=0)  # [b, s]
    tokens = inputs.tokens.gather(1, index)
    tokens[torch.arange(s) < pads[:, None]] = 0
    positions = inputs.positions.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))
    real = torch.arange(s) >= pads[:, None]
    mask = torch.ones(s, s).tril().bool() & real[:, None, :] | torch.eye(s).bool()
    return tokens, positions, mask, pads


@pytest.mark.parametrize("layout", ["mixed batch", "image and video"])
def test_cached_decoding_equals_the_full_forward(layout):
    model, inputs = tiny.model(), tiny.inputs(layout)
    tokens, positions, mask, pads = left_padded(inputs)
    b, s = tokens.shape
    media = encoder_input(inputs)
    wide = F.pad(mask, (0, 3))  # [b, s, length of the cache]

    def step(at, media=None, input_pos=positions):
        """Feed these columns of the batch."""
        return model(
            tokens[:, at], input_pos=input_pos[:, at], mask=wide[:, at], encoder_input=media
        )

    with torch.no_grad():
        full = model(tokens, input_pos=positions, encoder_input=media, mask=mask)
        plain = model(**inputs.ours)
        for row, pad in enumerate(pads.tolist()):
            assert (full[row, pad:] - plain[row, : s - pad]).abs().max() < 5e-6
        with local_kv_cache(
            model,
            batch_size=b,
            device=torch.device("cpu"),
            dtype=torch.float32,
            decoder_max_seq_len=s + 3,
        ):
            steps = [step(slice(s - 4), media)]  # the last four tokens of every row are text
            steps += [step(slice(at, at + 1)) for at in range(s - 4, s)]
            model.reset_caches()
            step(slice(s - 1), media)
            wrong = step(slice(s - 1, s), input_pos=torch.arange(s).expand(b, s))
        assert not model.caches_are_setup()
    assert (torch.cat(steps, dim=1) - full).abs().max() < 5e-6
    # the cache's own counter is no position once there was an image
    assert (wrong - full[:, -1:]).abs().max() > 1e-3


def test_caches_need_mask_and_positions():
    model, tokens = tiny.model(), tiny.text(1, 4)
    mask, input_pos = torch.ones(1, 4, 8).tril().bool(), torch.arange(4)
    model.setup_caches(1, torch.float32, decoder_max_seq_len=8)
    assert model.caches_are_setup()
    for kwargs in ({"mask": mask}, {"input_pos": input_pos}):
        with pytest.raises(ValueError, match="pass mask and input_pos"):
            model(tokens, **kwargs)
    with disable_kv_cache(model), pytest.raises(ValueError, match="causal"):
        model(tokens, input_pos=input_pos)  # stock attention would see the future here


def test_torchtunes_generate_with_and_without_caches():
    model, prompt = tiny.model(), tiny.text(2, 5)
    kwargs = {"max_generated_tokens": 6, "top_k": 1}
    plain, _ = generate(model, prompt, **kwargs)
    model.setup_caches(2, torch.float32, decoder_max_seq_len=5 + 6)
    cached, _ = generate(model, prompt, **kwargs)
    assert torch.equal(plain, cached)
    assert plain.shape == (2, 11)


@pytest.mark.parametrize(("dtype", "ulps"), [(torch.float32, 4), (torch.bfloat16, 0.51)])
def test_norm_is_torchtunes_without_its_warning(dtype, ulps):
    torch.manual_seed(0)
    norm = RMSNorm(64).to(dtype)
    norm.scale.data = torch.randn(64, dtype=dtype)
    x = 0.03 * torch.randn(50, 64, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = norm(x)
    inverse = (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    exact = x.double() * inverse * norm.scale
    bound = ulps * torch.finfo(dtype).eps * exact.abs()
    assert y.dtype == dtype
    assert ((y - exact).abs() <= bound).all()
    rounded_twice = (x.double() * inverse).to(dtype) * norm.scale
    assert ((rounded_twice - exact).abs() > bound).any() or dtype == torch.float32
    norm.eps = 1e-5
    assert ((norm(x) - exact).abs() > bound).any()


def test_the_encoder_may_have_another_dtype():
    """As where it is kept in fp32 beside a decoder in bf16."""
    model, inputs = tiny.model(), tiny.inputs()
    with torch.no_grad():
        expected = model(**inputs.ours)
        model.to(torch.bfloat16).vision.to(torch.float32)
        logits = model(**inputs.ours)
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_bf16_runs_without_a_warning():
    model, inputs = tiny.model().to(torch.bfloat16), tiny.inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits = model(**inputs.ours)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
