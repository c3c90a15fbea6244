"""Rows that come and go against each row alone, and what that costs in steps."""

import random
from collections import Counter

import pytest
import tiny
import torch

from parity.inputs import make_inputs
from torchtune_qwen25vl.generation import (
    Ended,
    NotFiniteError,
    Prompt,
    RunningBatch,
    Sampling,
    _places,
    _running,
    generate,
)
from torchtune_qwen25vl.generation._places import Continuing

PAD = 1007
ROWS = [  # text alone, an image, two images, a video; from 4 tokens to 66
    [4],
    [5, (1, 10, 14), 9],
    [21],
    [3, (1, 8, 8), 2, (1, 6, 18), 8],
    [60],
    [4, (5, 4, 6, 0.75), 9],
    [2, (1, 4, 4), 3],
    [33],
    [7, (1, 12, 12), 5],
    [5],
    [12, (1, 6, 4), 2],
    [50, (1, 4, 4), 8],
]
GREEDY = Sampling()
REPEATING = Sampling(repetition_penalty=1.5)
SAMPLED = Sampling(0.9, top_k=40, top_p=0.9, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def inputs():
    return [make_inputs([row], tiny.IDS, seed=seed) for seed, row in enumerate(ROWS)]


def sample(inputs):
    """A row as the transform would make it."""
    batch = inputs.ours
    return batch | {"tokens": batch["tokens"][0], "input_pos": batch["input_pos"][0]}


def chance(index):
    return torch.Generator().manual_seed(100 + index)


def alone(model, inputs, index, sampling, stops, most):
    said = generate(
        model,
        inputs.ours,
        max_new_tokens=most,
        stop_tokens=stops,
        generator=chance(index),
        **sampling._asdict(),
    )
    return said.tokens[0, : said.lengths[0]].tolist(), said.finish_reasons[0]


def all_alone(model, inputs, sampling, stops, most=24):
    return [Ended(k, *alone(model, one, k, sampling, stops, most)) for k, one in enumerate(inputs)]


def running(model, inputs, sampling, stops, *, places, least=1, most=24, order=None):
    """Rows enter in this order when at least so many places are free; what left, by row."""
    batch = RunningBatch(model, PAD, sampling, max_new_tokens=most, stop_tokens=stops)
    waiting = list(order or range(len(inputs)))
    left = []
    while waiting or batch.questions:
        free = places - len(batch.questions)
        if waiting and (free >= least or not batch.questions):
            new, waiting = waiting[:free], waiting[free:]
            batch.enter([Prompt(k, sample(inputs[k]), chance(k)) for k in new])
        ended = batch.advance()
        assert ended or not batch.questions
        left += ended
    assert len(left) == len(inputs)
    return sorted(left)


def stops_of(model, inputs, sampling):
    """Tokens with which some rows stop early, some late and some never."""
    free = all_alone(model, inputs, sampling, ())
    return [free[1].tokens[1], free[4].tokens[7], free[8].tokens[13], free[10].tokens[18]]


@pytest.mark.parametrize("sampling", [GREEDY, REPEATING, SAMPLED], ids=["greedy", "1.5", "drawn"])
def test_every_row_gets_what_it_gets_alone(model, inputs, sampling):
    stops = stops_of(model, inputs, sampling)
    expected = all_alone(model, inputs, sampling, stops)
    assert len({len(one.tokens) for one in expected}) > 3
    assert {one.finish_reason for one in expected} == {"stop", "length"}
    backwards = range(len(inputs))[::-1]
    shuffled = random.Random(0).sample(backwards, len(backwards))
    for places, least, order in (
        (1, 1, None),
        (3, 1, None),
        (4, 2, backwards),
        (5, 1, shuffled),
        (12, 1, None),
    ):
        options = {"places": places, "least": least, "order": order}
        assert running(model, inputs, sampling, stops, **options) == expected, options


@pytest.mark.parametrize("fault", ["a column too early", "a column too late", "sees what was"])
def test_a_row_that_is_off_by_one_is_seen(model, inputs, monkeypatch, fault):
    """The control: a token in the column before or behind its own, or a mask one column wide."""
    expected = all_alone(model, inputs, GREEDY, ())
    assert running(model, inputs, GREEDY, (), places=5) == expected
    if fault == "sees what was":
        decode = _running.decode_one_token

        def wider(model, tokens, positions, seen, caches):
            if seen is not None:
                seen = seen | seen.roll(1, 1)
                seen[:, 0] = True
            return decode(model, tokens, positions, seen, caches)

        monkeypatch.setattr(_running, "decode_one_token", wider)
    else:
        update, shift = Continuing.update, -1 if "early" in fault else 1

        def shifted(self, keys, values):
            last = self.columns.amax()
            columns = torch.where(self.columns < last, self.columns + shift, self.columns)
            moved = Continuing(self.keys, self.values, self.places, columns, self.width)
            return update(moved, keys, values)

        monkeypatch.setattr(Continuing, "update", shifted)
    assert running(model, inputs, GREEDY, (), places=5) != expected


def test_a_row_that_moves_takes_its_keys_along(model, inputs, monkeypatch):
    """The control: the row that comes into a freed place without them says something else."""
    stops = stops_of(model, inputs, GREEDY)
    expected = all_alone(model, inputs, GREEDY, stops)
    moves = []
    monkeypatch.setattr(_places.Places, "move", lambda self, *places: moves.append(places))
    assert running(model, inputs, GREEDY, stops, places=5) != expected
    assert moves


def test_what_others_said_is_no_repetition(model, inputs, monkeypatch):
    """The control: a penalty on whatever stands in the memory changes the answers."""
    expected = all_alone(model, inputs, REPEATING, ())
    whole = _places.Places.history
    monkeypatch.setattr(
        _places.Places, "history", lambda self, rows, width: whole(self, rows, width).flip(0)
    )
    assert running(model, inputs, REPEATING, (), places=5) != expected


def test_memory_is_that_of_the_rows_in_flight(model, inputs):
    """Rows times the longest that one may become; more rows that are shorter have it anew."""
    batch = RunningBatch(model, PAD, GREEDY, max_new_tokens=6)

    def entered(*rows):
        batch.enter([Prompt(k, sample(inputs[k])) for k in rows])
        rows, heads, width, head_dim = batch._places._keys[1].shape
        assert (heads, head_dim) == (2, 16)
        return rows, width

    longest = len(sample(inputs[10])["tokens"])
    assert entered(0, 2) == (2, 21 + 6)
    assert entered(4) == (3, 60 + 6)
    while batch.questions:
        batch.advance()
    assert entered(6, 9, 10) == (3, 60 + 6)
    assert entered(0) == (4, longest + 6)


def test_one_prompt_and_one_token(model, inputs):
    batch = RunningBatch(model, PAD, GREEDY, max_new_tokens=1)
    assert batch.advance() == []
    batch.enter([Prompt("a", sample(inputs[1]))])
    first = alone(model, inputs[1], 1, GREEDY, (), 1)
    assert batch.advance() == [Ended("a", *first)]
    assert batch.questions == []


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "drawn"])
@pytest.mark.parametrize("call", [0, 3])
def test_what_is_not_finite_is_refused_at_once(inputs, sampling, call):
    model, calls = tiny.model(), iter(range(99))

    def overflow(module, args, output):
        if next(calls) == call:
            output[1, ..., 7] = float("nan")
        return output

    model.output.register_forward_hook(overflow)
    batch = RunningBatch(model, PAD, sampling, max_new_tokens=6)
    prompts = [Prompt(k, sample(inputs[k]), chance(k)) for k in range(3)]
    with pytest.raises(NotFiniteError, match=r"those of rows \[1\].*bfloat16"):
        _ = batch.enter(prompts), batch.advance()
    assert next(calls) == call + 1


def test_a_step_waits_for_the_device_once(model, inputs, monkeypatch):
    """Greedily; a draw must know first that there is something to draw from."""
    waits, calls = Counter(), Counter()

    def counted(name):
        method = getattr(torch.Tensor, name)

        def run(*arguments, **options):
            waits[name] += 1
            return method(*arguments, **options)

        return run

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    batch = RunningBatch(model, PAD, GREEDY, max_new_tokens=20)
    batch.enter([Prompt(k, sample(inputs[k])) for k in range(5)])
    waits.clear()
    model.output.register_forward_hook(lambda *_: calls.update(["step"]))
    batch.advance()
    assert waits == {"tolist": 19} == {"tolist": calls["step"]}


LENGTHS = [64, 2, 2, 2, 50, 3, 4, 2, 40, 2, 5, 6, 30, 2, 3, 8]  # tokens of 16 answers


class Scripted:
    """Counts the forwards of `RunningBatch`, whose rows end when a script says so."""

    def __init__(self, monkeypatch):
        self.prefills, self.steps, self.rows = 0, 0, 0
        monkeypatch.setattr(_running, "prefill", self._prefill)
        monkeypatch.setattr(_running, "decode_one_token", self._decode)
        monkeypatch.setattr(
            RunningBatch,
            "_finish_reason",
            lambda _, row: "stop" if len(row.tokens) == LENGTHS[row.prompt.question] else None,
        )

    def _prefill(self, model, batch, caches, last):
        self.prefills += 1
        return torch.zeros(len(batch["tokens"]), 8)

    def _decode(self, model, tokens, *_):
        self.steps += 1
        self.rows += len(tokens)
        return torch.zeros(len(tokens), 8)


def test_steps_of_answers_of_all_lengths(model, inputs, monkeypatch):
    """16 rows, 4 places: in batches a step goes on until the longest answer of four has ended."""
    rows = [inputs[0]] * 16
    batches = sum(max(LENGTHS[k : k + 4]) - 1 for k in range(0, 16, 4))
    least = -(-sum(length - 1 for length in LENGTHS) // 4)  # no place is ever free
    counted = Scripted(monkeypatch)
    running(model, rows, GREEDY, (), places=4, most=64)
    assert (batches, least) == (180, 53)
    assert counted.steps <= 70
    assert counted.rows == sum(length - 1 for length in LENGTHS)


@pytest.mark.parametrize("sampling", [GREEDY, REPEATING, SAMPLED], ids=["greedy", "1.5", "drawn"])
def test_in_fixed_shapes_every_row_gets_what_it_gets_alone(model, inputs, sampling, monkeypatch):
    """As on a GPU, which the host asks every few tokens only."""
    stops = stops_of(model, inputs, sampling)
    expected = all_alone(model, inputs, sampling, stops)
    for module in (_places, _running):
        monkeypatch.setattr(module, "fixes_shapes", lambda model: True)
    for places in (1, 5, 12):
        assert running(model, inputs, sampling, stops, places=places) == expected, places


@pytest.mark.parametrize("copies", [1, 3])
def test_rows_of_one_sample_share_what_is_read_and_draw_for_themselves(model, inputs, copies):
    """Tokens, and their log-probabilities, as of rows that are read each for itself."""
    samples = [sample(inputs[k]) for k in (1, 2, 3)]
    sampling = Sampling(temperature=1.3)

    def rows(of):
        batch = RunningBatch(
            model,
            0,
            sampling,
            max_new_tokens=6,
            stop_tokens=[7],
            banned=(1001, 1002),
            with_log_probs=True,
        )
        prompts = [
            Prompt((k, c), one, torch.Generator().manual_seed(10 * k + c))
            for k, one in enumerate(samples)
            for c in range(copies)
        ]
        for start in range(0, len(prompts), of):
            batch.enter(prompts[start : start + of], copies=min(of, copies))
        ended = []
        while batch.questions:
            ended += batch.advance()
        return sorted(ended)

    patches = []
    hook = model.vision.register_forward_pre_hook(
        lambda module, args, kwargs: patches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    together = rows(of=copies * len(samples))
    hook.remove()
    assert sum(patches) == 10 * 14 + 8 * 8 + 6 * 18
    for one, other in zip(together, rows(of=1), strict=True):
        assert one[:3] == other[:3]
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)
        assert len(one.log_probs) == len(one.tokens)
        assert not {1001, 1002} & set(one.tokens)
    assert len({tuple(one.tokens) for one in together}) == len(together)
