"""A batch whose rows come and go: a row that has ended gives its place to the next prompt.

Which tokens a row has is known on the host, which waits for the device once a step to read them;
all that a step needs goes back in one transfer. What the device keeps are `Places`.

Shapes: b rows in flight, k rows that enter, s prompt tokens, w columns, v vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.generation._fixed import ASK_EVERY, fixes_shapes
from torchtune_qwen25vl.generation._forward import decode_one_token, prefill
from torchtune_qwen25vl.generation._generate import evaluating
from torchtune_qwen25vl.generation._places import Places
from torchtune_qwen25vl.generation._sampling import (
    Chosen,
    Sampling,
    check_finite,
    check_options,
    choose,
)
from torchtune_qwen25vl.transform import batch_to_device, padded_collate

Q = TypeVar("Q")
AT_ONCE = 2048  # tokens of prompts that a CPU reads in one forward, padding included


class Ended(NamedTuple, Generic[Q]):
    """A row that has left."""

    question: Q
    tokens: list[int]  # its stop token included
    finish_reason: Literal["stop", "length"]
    log_probs: Sequence[float] = ()  # of each token among what could be drawn, if asked for


@dataclass(frozen=True)
class Prompt(Generic[Q]):
    """What is to be continued.

    Attributes:
        question: whatever tells the caller which row it is
        sample: what `Qwen25VLTransform` returns with `inference=True`
        generator: the row's own source of chance, on the model's device; None where it is greedy
    """

    question: Q
    sample: Mapping[str, Any]
    generator: torch.Generator | None = None


@dataclass
class _Row(Generic[Q]):
    """A prompt and what was chosen after it; its last token is not in the caches yet."""

    prompt: Prompt[Q]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.length = len(self.prompt.sample["tokens"])
        self._first_position = int(torch.as_tensor(self.prompt.sample["input_pos"]).max()) + 1

    @property
    def column(self) -> int:
        """Column of the last token."""
        return self.length + len(self.tokens) - 1

    @property
    def position(self) -> int:
        """Position of the last token."""
        return self._first_position + len(self.tokens) - 1


class RunningBatch(Generic[Q]):
    """Continue rows, each with the tokens that `generate` gives it alone.

    A step costs what the rows in flight cost: those that ended are in it no more. After an
    exception the rows are lost, and the batch is not to be used any further.

    Args:
        model: Qwen25VL
        pad_id: token at padding, `transform.pad_id`
        sampling: how tokens are chosen
        max_new_tokens: length of the longest continuation
        stop_tokens: a row ends with the first of these
        banned: tokens that are never chosen
        with_log_probs: whether log-probabilities of the tokens are wanted

    Raises:
        ValueError: if an option is out of range.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        pad_id: int,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        stop_tokens: Sequence[int] = (),
        banned: Sequence[int] = (),
        with_log_probs: bool = False,
    ) -> None:
        check_options(max_new_tokens, sampling)
        self._model, self._pad_id, self._sampling = model, pad_id, sampling
        self._max_new_tokens, self._stop_tokens = max_new_tokens, frozenset(stop_tokens)
        self._banned, self._with_log_probs = tuple(banned), with_log_probs
        self._device = model.norm.scale.device
        self._ask_every = ASK_EVERY if fixes_shapes(model) else 1
        self._rows: list[_Row[Q]] = []  # in the order of their places
        self._places = Places(model)

    @property
    def questions(self) -> list[Q]:
        """The questions of all rows in flight."""
        return [row.prompt.question for row in self._rows]

    def enter(self, prompts: Sequence[Prompt[Q]], *, copies: int = 1) -> None:
        """Read prompts, and choose the first token of each.

        Prompts in a row that have one sample are read once: `copies` of each.

        Args:
            prompts: prompts in order
            copies: how many of them in a row have one sample

        Raises:
            NotFiniteError: if logits are nan or infinite.
        """
        new = [_Row(prompt) for prompt in prompts]
        longest = max(row.length for row in [*self._rows, *new])
        with evaluating(self._model):
            width = longest + self._max_new_tokens + self._ask_every - 1
            self._places.reserve(len(self._rows) + len(new), width)
            for group in self._groups(new[::copies]):
                count = len(group) * copies
                self._read(new[:count], copies)
                new = new[count:]

    def _groups(self, new: list[_Row[Q]]) -> Iterator[list[_Row[Q]]]:
        """Split rows into those read in one forward: on a CPU few, elsewhere all.

        A CPU's caches do not hold what many rows make in a layer, and memory of that size is given
        back and mapped anew at every step: 32 rows at once took 1.25 times as long as 4 to 16.
        """
        most = AT_ONCE if self._device.type == "cpu" else sum(row.length for row in new)
        group: list[_Row[Q]] = []
        for row in new:
            longest = max(one.length for one in [*group, row])
            if group and (len(group) + 1) * longest > most:
                yield group
                group = []
            group.append(row)
        yield group

    def _read(self, new: list[_Row[Q]], copies: int) -> None:
        """Read the prompts of rows in one forward."""
        first = len(self._rows)
        self._rows += new
        batch = padded_collate([row.prompt.sample for row in new[::copies]], self._pad_id)
        last = torch.tensor([row.length - 1 for row in new[::copies]])[:, None]  # [k, 1]
        columns = torch.arange(batch["tokens"].shape[1])  # [s]
        held = torch.where(columns > last, batch["tokens"].gather(1, last), batch["tokens"])
        batch |= {"held": held, "last": columns == last}  # [k, s]
        batch_to_device(batch, self._device, self._model.norm.scale.dtype)
        read = slice(first, len(self._rows), copies)
        caches = self._places.begin(read, batch["held"])
        logits = prefill(self._model, batch, caches, last=batch["last"])
        self._places.repeat(read)
        logits = logits.repeat_interleave(copies, 0)
        places = slice(first, len(self._rows))
        self._keep([self._choose(logits, places, batch["held"].shape[1], new)], new)

    def advance(self) -> list[Ended[Q]]:
        """Continue all rows until some have ended; return these, which leave.

        Raises:
            NotFiniteError: if logits are nan or infinite.
        """
        with evaluating(self._model):
            while self._rows and not any(map(self._finish_reason, self._rows)):
                self._decode()
            return self._leave()

    def _decode(self) -> None:
        """Continue all rows by one token, or by several where the host looks less often."""
        rows = self._rows
        inputs = [[row.column, row.position, row.tokens[-1]] for row in rows]
        moved = torch.tensor(inputs).T.contiguous().to(self._device, non_blocking=True)
        columns, positions, tokens = moved  # [b] each
        width = max(row.column for row in rows) + 1
        chosen: list[Chosen] = []
        for step in range(self._ask_every):
            logits = self._step(tokens, positions + step, columns + step, width + step)
            chosen.append(self._choose(logits, slice(len(rows)), width + step, rows))
            tokens = chosen[-1].tokens
        self._keep(chosen, rows)

    def _step(self, tokens: Tensor, positions: Tensor, columns: Tensor, width: int) -> Tensor:
        """Append a token to each row, of which the longest then has `width`; return logits."""
        if fixes_shapes(self._model):
            self._places.hold(columns, tokens)
            return self._places.fixed_step()(tokens, positions, columns)
        caches = self._places.append(columns, tokens, width)
        seen = None
        if any(row.column + 1 < width for row in self._rows):
            seen = torch.arange(width, device=self._device) <= columns[:, None]  # [b, w]
        return decode_one_token(self._model, tokens, positions, seen, caches)

    def _choose(self, logits: Tensor, places: slice, width: int, rows: Sequence[_Row[Q]]) -> Chosen:
        """Choose a token for each of these rows from logits [b, v]."""
        generators = [row.prompt.generator for row in rows]
        return choose(
            logits,
            self._places.history(places, width),
            self._sampling,
            generators,
            banned=self._banned,
            with_log_probs=self._with_log_probs,
        )

    def _keep(self, chosen: Sequence[Chosen], rows: Sequence[_Row[Q]]) -> None:
        """Give each row its tokens, up to the one that ends it.

        Args:
            chosen: what was chosen in each step
            rows: the b rows
        """
        tokens, peaks, log_probs = (torch.stack(parts) for parts in zip(*chosen, strict=True))
        seen = torch.stack((tokens.float(), peaks.isfinite().float(), log_probs))  # [3, steps, b]
        told, finite, likely = seen.tolist()  # the device's only wait
        for place, row in enumerate(rows):
            for step in range(len(chosen)):
                if row.tokens and self._finish_reason(row):
                    break
                if not finite[step][place]:
                    check_finite(peaks[step, :, None])
                row.tokens.append(int(told[step][place]))
                if self._with_log_probs:
                    row.log_probs.append(likely[step][place])

    def _leave(self) -> list[Ended[Q]]:
        """Take out rows that have ended; rows from the last places come into theirs."""
        ended = []
        for place in reversed(range(len(self._rows))):
            row = self._rows[place]
            if reason := self._finish_reason(row):
                ended.append(Ended(row.prompt.question, row.tokens, reason, tuple(row.log_probs)))
                if row is not (last := self._rows.pop()):
                    self._places.move(len(self._rows), place)
                    self._rows[place] = last
        return ended[::-1]

    def _finish_reason(self, row: _Row[Q]) -> Literal["stop", "length"] | None:
        if row.tokens[-1] in self._stop_tokens:
            return "stop"
        return "length" if len(row.tokens) == self._max_new_tokens else None
