"""Hidden states of a batch, taken while a forward runs.

Shapes: b rows, n vectors of a span in one row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchtune_qwen25vl.generation import evaluating
from torchtune_qwen25vl.hidden_states._selectors import Selector, read_selectors
from torchtune_qwen25vl.hidden_states._spans import Boundary, Spans
from torchtune_qwen25vl.model import Qwen25VL

State = Tensor | list[Tensor]


def hidden_states(
    model: Qwen25VL,
    batch: Mapping[str, Any],
    wanted: Sequence[str],
    *,
    vision_boundary: Boundary = "last",
) -> dict[str, State]:
    """Return hidden states of every row of a batch, each as the row has it alone.

    One forward is run, and nothing is kept of it but the spans asked for. Where an answer is
    wanted too, `generate(..., observe=Recorder(...))` takes the states from its own prefill.

    Args:
        model: Qwen25VL
        batch: as a collate gives it, on the model's device; padded on either side, not packed
        wanted: selectors `SITE/SPAN`; `hidden_states/_selectors.py` lists sites, spans and forms.
            The state of `layer.K` is the output of block K before any final norm, which is
            `hidden_states[K + 1]` of transformers, except for the last block: there transformers
            has what is `norm` here.
        vision_boundary: which token is `image_last`, see `Spans`

    Returns:
        States in the dtype of the model: [b, width], or for spans that end in `all` a list of b
        tensors [n, width]. A selector of one block is there as it was written; of several, each
        under its number, as `layer.7/last`. A row without images has nan, or n = 0, where an image
        is asked for. Means are computed in fp32.

    Raises:
        ValueError: if a text is no selector, or the batch is packed.
    """
    recorder = Recorder(model, batch, wanted, vision_boundary=vision_boundary)
    with evaluating(model):
        model(
            batch["tokens"],
            input_pos=batch["input_pos"],
            mask=batch.get("mask"),
            encoder_input=batch.get("encoder_input"),
            output="hidden",
            observe=recorder,
        )
    return recorder.states()


class Recorder:
    """An observer that takes what is wanted of one batch, and nothing else.

    Args:
        model: whose forward will be observed
        batch: its input
        wanted: selectors
        vision_boundary: which token is `image_last`, see `Spans`

    Raises:
        ValueError: if a text is no selector, or the batch is packed.
    """

    def __init__(
        self,
        model: Qwen25VL,
        batch: Mapping[str, Any],
        wanted: Sequence[str],
        *,
        vision_boundary: Boundary = "last",
    ) -> None:
        self._selectors = read_selectors(
            wanted, num_layers=len(model.layers), vision_num_layers=len(model.vision.layers)
        )
        self._spans = Spans(model, batch, vision_boundary)
        self._taken: dict[Selector, State] = {}
        like = model.norm.scale
        rows, width = len(batch["tokens"]), model.vision.patch_embed.proj.out_features
        self._absent = {  # of sites that a batch without images does not reach
            "vision": like.new_full((rows, width), torch.nan),
            "merger": like.new_full((rows, len(like)), torch.nan),
        }

    def __call__(self, site: str, x: Tensor, *, index: int | None = None) -> None:
        """Take from a site what is wanted of it."""
        for selector in set(self._selectors.values()):
            if (selector.site, selector.index) == (site, index):
                self._taken[selector] = self._take(selector, x)

    def _take(self, selector: Selector, x: Tensor) -> State:
        span = self._spans[selector]
        vectors = x[tuple(places.to(x.device) for places in span.places)]  # n of all rows
        by_row = vectors.split(span.lengths)  # b of [n, width]
        if selector.is_whole:
            return [vectors.clone() for vectors in by_row]
        means = [vectors.mean(0, dtype=torch.float32) for vectors in by_row]  # nan where n = 0
        return torch.stack(means).to(x.dtype)  # [b, width]

    def states(self) -> dict[str, State]:
        """Return what was taken, as `hidden_states` does."""
        return {name: self._state(selector) for name, selector in self._selectors.items()}

    def _state(self, selector: Selector) -> State:
        if selector in self._taken:
            return self._taken[selector]
        absent = self._absent[selector.site]
        return [row.new_empty(0, len(row)) for row in absent] if selector.is_whole else absent
