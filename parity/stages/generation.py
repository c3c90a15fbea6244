"""Many tokens from one: greedy continuations, and rows that share a batch without sharing more."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchtune import utils

from parity import reference
from parity.inputs import LAYOUTS, Inputs, make_inputs
from parity.stages._stage import Measurement, Setting, Stage, max_error
from parity.stages.model import cases
from parity.trace import inputs_for, trace_theirs
from torchtune_qwen25vl import generate, packed_collate

NEW_TOKENS = 64
SEEDS = 20
PENALTY = 1.3  # of tokens that a row already holds


def measure_greedy(setting: Setting) -> Iterator[Measurement]:
    """Tokens that differ from theirs, batched and left padded, and from our own single runs."""
    name = setting.checkpoint or "tiny"
    theirs = reference.model(name, setting.device)
    model = setting.ours_like(theirs)
    ids = reference.ids(theirs)
    yield from _repetitions(setting, theirs)
    for seed in range(2 if setting.small else SEEDS):
        for layout in ("mixed batch", "image and video"):
            inputs = make_inputs(LAYOUTS[layout], ids, seed=seed).to(setting.device).padded_left()
            their_tokens = reference.greedy(theirs, inputs, NEW_TOKENS)
            batch = generate(model, inputs.ours, max_new_tokens=NEW_TOKENS).tokens
            yield Measurement(f"{layout}, seed {seed}", float((batch != their_tokens).sum()))
            if seed == 0:
                with memory_of_nan():
                    again = generate(model, inputs.ours, max_new_tokens=NEW_TOKENS).tokens
                wrong = float((again != their_tokens).sum())
                yield Measurement(f"{layout}, memory set aside holds nan", wrong)
            for index in range(len(batch)):
                row = inputs.row(index).ours
                alone = generate(model, row, max_new_tokens=NEW_TOKENS).tokens
                wrong = float((alone != batch[index]).sum())
                yield Measurement(f"{layout}, seed {seed}, row {index} alone", wrong)


def _repetitions(setting: Setting, theirs: Any) -> Iterator[Measurement]:
    """A batch whose padding is what each row would say; all others end in what the shortest would.

    Neither is a repetition: counted as one, it would keep a row from its first token.
    """
    inputs = make_inputs(LAYOUTS["mixed batch"], reference.ids(theirs)).to(setting.device)
    lengths = inputs.attention_mask.sum(1)
    short = int(lengths.argmin())
    others = (torch.arange(len(lengths), device=lengths.device) != short).nonzero().flatten()
    tokens = inputs.tokens.clone()
    tokens[others, lengths[others] - 1] = _penalised(theirs, inputs.row(short))[0, 0]
    inputs = replace(inputs, tokens=tokens)
    said = torch.cat([_penalised(theirs, inputs.row(k)) for k in range(len(tokens))])  # [b, n]
    inputs = inputs.padded_left()
    is_token = inputs.attention_mask.bool()
    inputs = replace(inputs, tokens=torch.where(is_token, inputs.tokens, said[:, :1]))
    ours = generate(
        setting.ours_like(theirs),
        inputs.ours,
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=PENALTY,
    ).tokens
    yield Measurement("repetitions, padding a row would say", float((ours != said).sum()))


def _penalised(theirs: Any, row: Inputs) -> Tensor:
    """Their greedy continuation [1, n] of one row that is kept from repeating itself."""
    return reference.generate(theirs, row, NEW_TOKENS, do_sample=False, repetition_penalty=PENALTY)


@contextlib.contextmanager
def memory_of_nan() -> Iterator[None]:
    """Memory that torch sets aside holds nan, so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def measure_packed(setting: Setting) -> Iterator[Measurement]:
    """Logits of rows packed into one, against theirs side by side."""
    for name, layout in cases(setting):
        inputs = inputs_for(layout, name)
        if len(inputs.tokens) == 1:
            continue
        rows = [inputs.row(index) for index in range(len(inputs.tokens))]
        packed = packed_collate([_sample(row.ours, row.labels) for row in rows], 0)
        del packed["labels"]
        utils.batch_to_device(packed, torch.device(setting.device))
        with torch.no_grad():
            model = setting.ours_like(reference.model(name, setting.device))
            ours = model(**packed)[0].cpu()  # [s, v]
        theirs = trace_theirs(name, layout, setting.device).logits
        assert theirs is not None
        right = theirs[inputs.attention_mask.bool()]
        tolerance = 1e-5 * max(2.0, float(right.abs().max()) if name == "stress" else 0)
        yield Measurement(f"{name}: {layout}", max_error(ours, right), tolerance)


def _sample(batch: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """A batch of one row as the sample it was made of."""
    alone = {"tokens": batch["tokens"][0], "input_pos": batch["input_pos"][0], "labels": labels[0]}
    return {**batch, **alone}


GREEDY = Stage(
    name="greedy tokens",
    what=f"{NEW_TOKENS} greedy tokens from a key-value cache, in left-padded batches and alone",
    tolerance="0: the same tokens",
    fault="decoding from the cache index",
    measure=measure_greedy,
)
PACKED = Stage(
    name="packed",
    what="logits of samples packed into one row, against theirs in a padded batch",
    tolerance="2e-5: four times the fp32 noise, as for logits",
    fault="packed samples see each other",
    measure=measure_packed,
)
