"""What rows that come and go keep while they are continued.

Every row has a place, and stands in it from column 0 on whatever its length. So a prompt is read
into its place at once, nothing moves when another row enters, and the mask is `column < length`.

Shapes: r places, w columns, b rows in flight, k rows that enter, s prompt tokens, n_kv key-value
heads, h_d head dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.generation._fixed import WIDTHS, FixedStep, fixes_shapes
from torchtune_qwen25vl.model import product_dtype
from torchtune_qwen25vl.transform import round_up


class Places:
    """Tokens of rows, and their keys and values in every layer.

    Memory is that of the rows in flight, up to the longest that one of them may become. It begins
    as zeros: what a row does not see is multiplied by 0, and must be finite.

    Args:
        model: Qwen25VL
    """

    def __init__(self, model: TransformerDecoder) -> None:
        self._model = model
        self._fixed_step: FixedStep | None = None
        like = model.norm.scale
        empty = [
            torch.empty(
                (0, layer.attn.num_kv_heads, 0, layer.attn.head_dim),
                dtype=product_dtype(like),
                device=like.device,
            )
            for layer in model.layers
        ]
        self._keys, self._values = list(empty), list(empty)  # [r, n_kv, w, h_d] of each layer
        self._tokens = torch.empty((0, 0, 1), dtype=torch.int64, device=like.device)  # [r, w, 1]

    def reserve(self, rows: int, width: int) -> None:
        """Have places for so many rows of so many columns; what is there stays there."""
        if fixes_shapes(self._model):
            width = round_up(width, WIDTHS)
        if rows <= self._tokens.shape[0] and width <= self._tokens.shape[1]:
            return
        self._fixed_step = None
        self._tokens = _resized(self._tokens, rows, width)
        for held in (self._keys, self._values):
            for layer, tensor in enumerate(held):
                held[layer] = _resized(tensor, rows, width)

    def move(self, source: int, target: int) -> None:
        """Copy the row of one place into another."""
        for held in (self._tokens, *self._keys, *self._values):
            held[target] = held[source]

    def repeat(self, rows: slice) -> None:
        """Copy each of these rows, some places apart, into all places up to the next of them."""
        for held in (self._tokens, *self._keys, *self._values):
            for offset in range(1, rows.step):
                held[rows.start + offset : rows.stop : rows.step] = held[rows]

    def history(self, rows: slice, width: int) -> Tensor:
        """Return the tokens of rows, [b, w]; behind its end a row repeats one that it holds."""
        return self._tokens[rows, :width, 0]

    def begin(self, rows: slice, tokens: Tensor) -> list["Beginning"]:
        """Hold prompts [k, s]; return the caches that their keys and values are read into."""
        self._tokens[rows, : tokens.shape[1], 0] = tokens
        self._tokens[rows, tokens.shape[1] :, 0] = tokens[:, -1:]
        pairs = zip(self._keys, self._values, strict=True)
        return [Beginning(keys[rows], values[rows]) for keys, values in pairs]

    def fixed_step(self, real: Tensor | None = None) -> FixedStep:
        """Return what continues all places by one token, until more are reserved.

        Args:
            real: which columns are no padding, bool [r, any]; None where all are
        """
        if self._fixed_step is None:
            if real is not None:
                real = F.pad(real, (0, self._tokens.shape[1] - real.shape[1]), value=True)
            self._fixed_step = FixedStep(self._model, self._keys, self._values, real)
        return self._fixed_step

    def hold(self, columns: Tensor, tokens: Tensor) -> None:
        """Hold one token more of each row, [b], in its column, [b]."""
        self._tokens[: len(tokens), :, 0].scatter_(1, columns[:, None], tokens[:, None])

    def append(self, columns: Tensor, tokens: Tensor, width: int) -> list["Continuing"]:
        """Hold one token more of each row; return the caches for its keys and values.

        Args:
            columns: column of the token in each row, [b]
            tokens: these tokens, [b]
            width: columns of the longest row, this token included
        """
        places = torch.arange(len(columns), device=columns.device)
        self.hold(columns, tokens)
        pairs = zip(self._keys, self._values, strict=True)
        return [Continuing(keys, values, places, columns, width) for keys, values in pairs]


@dataclass(frozen=True)
class Beginning:
    """The places of rows that enter, in one layer, [k, n_kv, w, h_d]."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values of prompts, [k, n_kv, s, h_d], and return them."""
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : keys.shape[2]] = values
        return keys, values


@dataclass(frozen=True)
class Continuing:
    """The places of all rows in flight, in one layer, and where their next token goes."""

    keys: Tensor  # [r, n_kv, w, h_d]
    values: Tensor
    places: Tensor  # [b]
    columns: Tensor  # [b]
    width: int

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put keys and values of one token, [b, n_kv, 1, h_d], to those so far; return all."""
        self.keys[self.places, :, self.columns] = keys[:, :, 0]
        self.values[self.places, :, self.columns] = values[:, :, 0]
        rows = len(self.places)
        return self.keys[:rows, :, : self.width], self.values[:rows, :, : self.width]


def _resized(old: Tensor, rows: int, width: int) -> Tensor:
    """Return zeros [rows, ..., width, any] with as much of what was there as they hold."""
    new = old.new_zeros((rows, *old.shape[1:-2], width, old.shape[-1]))
    kept, columns = min(rows, old.shape[0]), min(width, old.shape[-2])
    new[:kept, ..., :columns, :] = old[:kept, ..., :columns, :]
    return new
