"""Decoding in shapes that never change, so that a GPU can be handed a whole step at once.

A token of 3B is a thousand kernels, which a GPU runs faster than a host can launch them. Where
nothing grows, the host records them as a CUDA graph, and from then on launches the graph. So
the caches are as long as they may become, every row writes at a column that a tensor tells, and
the mask covers all columns. Of what comes out, the host reads several tokens at a time.

Shapes: b rows, w columns, v vocabulary, n_kv key-value heads, h_d head dim.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.generation._forward import decode_one_token

ASK_EVERY = 8  # tokens after which the host looks which rows have ended
WIDTHS = 256  # columns are a multiple of this, so that few widths are recorded
RECORD_AFTER = 8  # steps; recording takes as long as a few, which a short answer would not win back
WARM_UPS = 3  # runs before recording, in which libraries set themselves up


def fixes_shapes(model: TransformerDecoder) -> bool:
    """Say whether steps of this model gain by fixed shapes: on a GPU, and not sharded."""
    return model.norm.scale.is_cuda and not isinstance(model, FSDPModule)


@dataclass(frozen=True)
class FixedCache:
    """Keys and values of one layer, [b, n_kv, w, h_d], and the columns of the next tokens, [b]."""

    keys: Tensor
    values: Tensor
    columns: Tensor

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values of one token, [b, n_kv, 1, h_d], in their columns; return all."""
        columns = self.columns[:, None, None, None].expand_as(keys)
        self.keys.scatter_(2, columns, keys)
        self.values.scatter_(2, columns, values)
        return self.keys, self.values


class FixedStep:
    """Continues all rows by one token.

    Args:
        model: Qwen25VL
        keys: keys of each layer, [b, n_kv, w, h_d], finite also where there are none yet
        values: values of each layer, likewise
        real: which of the prompts' columns are no padding, bool [b, w]; None where all are
    """

    def __init__(
        self,
        model: TransformerDecoder,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        real: Tensor | None = None,
    ) -> None:
        rows, _, width, _ = keys[0].shape
        device = keys[0].device
        self._model, self._real = model, real
        self._tokens, self._positions, self._columns = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._index = torch.arange(width, device=device)
        pairs = zip(keys, values, strict=True)
        self._caches = [FixedCache(*pair, self._columns) for pair in pairs]
        self._run, self._steps = self.decode, 0

    def __call__(self, tokens: Tensor, positions: Tensor, columns: Tensor) -> Tensor:
        """Append one token per row; return logits of the next one, fp32 [b, v].

        Args:
            tokens: the last token of each row, [b or fewer]; the rows that are left out do nothing
                that anyone reads
            positions: positions of these tokens
            columns: columns of these tokens
        """
        rows = len(tokens)
        self._tokens[:rows] = tokens
        self._positions[:rows] = positions
        self._columns[:rows] = columns
        if self._steps == RECORD_AFTER and tokens.is_cuda:
            self._run = recorded(self.decode)
        self._steps += 1
        return self._run()[:rows]

    def decode(self) -> Tensor:
        """Compute the logits of what stands in the inputs, fp32 [b, v]."""
        seen = self._index <= self._columns[:, None]  # [b, w]
        if self._real is not None:
            seen = seen & self._real
        return decode_one_token(self._model, self._tokens, self._positions, seen, self._caches)


def recorded(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what a step launches, as a CUDA graph, and return what launches it all at once.

    A step that cannot be recorded is run as it is, with a warning that says why.
    """
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"tokens are decoded without a CUDA graph, and slower: {why}", stacklevel=3)
        return step

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
