"""How generation draws tokens, compared with transformers, and what it refuses."""

import itertools
import re

import pytest
import tiny
import torch

from parity import reference, trace
from torchtune_qwen25vl.generation._generate import generate
from torchtune_qwen25vl.generation._sampling import Sampling, process_logits


def prompts(layout="mixed batch"):
    """Rows padded on the left: an image; text alone; two images."""
    return tiny.inputs(layout).padded_left()


GRID = [
    Sampling(temperature, top_k, top_p, repetition_penalty)
    for temperature, top_k, top_p, repetition_penalty in itertools.product(
        (0.3, 1.0, 1.7), (None, 1, 20, 5000), (None, 0.05, 0.8, 1.0), (1.0, 1.3)
    )
]


def test_scores_equal_transformers_processors():
    """Ties as bf16 logits have them included; which tokens may be drawn is equal exactly."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 300, generator=generator)).bfloat16().float()
    history = torch.randint(0, 300, (4, 30), generator=generator)
    for sampling in GRID:
        ours = process_logits(logits, history, sampling)
        theirs = reference.process_logits(logits, history, **sampling._asdict())
        assert torch.equal(ours, theirs), sampling


def test_order_of_the_processors_shows():
    """The control: top-p before the temperature lets other tokens through."""
    logits, history = torch.linspace(-4, 4, 50)[None], torch.zeros(1, 1, dtype=torch.long)
    early = process_logits(logits, history, Sampling(1.0, top_p=0.7))
    options = Sampling(3.0, top_p=0.7)
    theirs = reference.process_logits(logits, history, **options._asdict())
    assert torch.equal(process_logits(logits, history, options), theirs)
    assert not torch.equal(process_logits(early, history, Sampling(3.0)), theirs)


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.2])
def test_drawn_tokens_equal_transformers(repetition_penalty):
    theirs = reference.random_model("tiny")
    model = trace.ours_like(theirs)
    inputs = prompts("two images")
    options = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    options["repetition_penalty"] = repetition_penalty
    torch.manual_seed(5)
    expected = reference.generate(theirs, inputs, 32, do_sample=True, **options)
    drawn = [
        generate(
            model,
            inputs.ours,
            max_new_tokens=32,
            generator=torch.Generator().manual_seed(seed),
            **options,
        ).tokens
        for seed in (5, 5, 6)
    ]
    assert torch.equal(drawn[0], expected)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_padding_is_no_repetition():
    model, inputs = tiny.model(), prompts()
    options = {"max_new_tokens": 32, "repetition_penalty": 1.5}
    batch = generate(model, inputs.ours, **options).tokens
    for index, row in enumerate(batch):
        assert torch.equal(generate(model, inputs.row(index).ours, **options).tokens[0], row)
    assert not torch.equal(batch, generate(model, inputs.ours, max_new_tokens=32).tokens)


def test_right_padding_is_refused():
    model, inputs = tiny.model(), tiny.inputs()
    short = (inputs.attention_mask == 0).any(1).nonzero().flatten().tolist()
    for batch in (inputs.ours, {**inputs.ours, "mask": torch.ones(3, 1, 1).bool()}):
        with pytest.raises(
            ValueError, match=rf"rows {re.escape(str(short))}.*not; collate with padding_side"
        ):
            generate(model, batch, max_new_tokens=1)


def test_left_padding_without_a_mask_is_refused():
    batch = dict(prompts().ours)
    del batch["mask"]
    with pytest.raises(ValueError, match="come with a mask"):
        generate(tiny.model(), batch, max_new_tokens=1)


def test_a_valid_prompt_is_not_taken_for_padding():
    """A row of one token beside a longer one; frame groups so close that all are at time 0."""
    model = tiny.model()
    tokens = torch.tensor([[5, 5, 7], [5, 6, 7]])
    mask = torch.ones(3, 3, dtype=torch.bool).tril().repeat(2, 1, 1)
    mask[0] = torch.eye(3, dtype=torch.bool)
    positions = torch.tensor([[0, 0, 0], [0, 1, 2]])[..., None].repeat(1, 1, 3)
    batch = {"tokens": tokens, "input_pos": positions, "mask": mask}
    alone = {"tokens": tokens[:1, 2:], "input_pos": positions[:1, 2:]}
    both, one = (generate(model, prompt, max_new_tokens=4).tokens for prompt in (batch, alone))
    assert torch.equal(both[:1], one)

    video, text = tiny.IDS["video_token_id"], 7
    shown = {
        "tokens": torch.tensor([[video, video, text]]),
        "input_pos": torch.tensor([0, 0, 1])[None, :, None].repeat(1, 1, 3),
        "encoder_input": {
            "vision": {
                "pixel_values": torch.randn(8, 1176, generator=torch.Generator().manual_seed(0)),
                "grid_thw": torch.tensor([[2, 2, 2]]),
            }
        },
    }
    assert generate(model, shown, max_new_tokens=2).lengths == [2]


def test_positions_must_have_three_axes():
    batch = {"tokens": tiny.text(1, 4), "input_pos": torch.arange(4)[None]}
    with pytest.raises(ValueError, match=r"\[b, s, 3\], got \[1, 4\]"):
        generate(tiny.model(), batch, max_new_tokens=1)


@pytest.mark.parametrize(
    "option",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
    ],
)
def test_options_out_of_range_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be .*got {option[name]}"):
        generate(tiny.model(), prompts("image").ours, **{"max_new_tokens": 1, **option})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("call", [0, 3])
def test_logits_that_are_not_finite_are_refused(temperature, call):
    """At once after the prefill, at the end later: asking every step would stall a GPU."""
    model, calls = tiny.model(), itertools.count()

    def overflow(module, args, output):
        if next(calls) == call:
            output[1, ..., 7] = float("nan")
        return output

    model.output.register_forward_hook(overflow)
    with pytest.raises(ValueError, match=r"those of rows \[1\].*bfloat16"):
        generate(model, prompts().ours, max_new_tokens=6, temperature=temperature)
