"""Where the spans of each row lie in what the sites of a model hold.

Shapes: b rows, s tokens, i images and videos, m merged units (one per placeholder), n vectors of a
span over all rows.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchtune_qwen25vl._torchtune import labelled_rows
from torchtune_qwen25vl.hidden_states._selectors import Selector
from torchtune_qwen25vl.model import Qwen25VL

Boundary = Literal["last", "halp"]


class Span(NamedTuple):
    """Where one span lies.

    Attributes:
        places: of its n vectors, row after row: rows and columns of [b, s, d] in the decoder,
            patches of [p, d_v] or units of [m, d] in the encoder, int64 [n] each
        lengths: vectors of each row, b of them; 0 where a row has no such span
    """

    places: tuple[Tensor, ...]
    lengths: list[int]


class Spans:
    """The spans of a batch whose rows may be padded on either side.

    Args:
        model: knows placeholders, and how its encoder arranges patches
        batch: as a collate gives it
        boundary: which token is `image_last`: "last", the last placeholder; "halp", the one that
            the published HALP scripts take, number min(t * h * w, s // 2) of the row without
            padding, where t, h, w is the grid of its first image: mostly in the midst of the image

    Raises:
        ValueError: if samples are packed, or have no positions on three axes.
    """

    def __init__(self, model: Qwen25VL, batch: Mapping[str, Any], boundary: Boundary) -> None:
        image = model.placeholders(batch["tokens"]).cpu()  # [b, s]
        real = _real(batch, image)
        prompt = real & ~_answers(batch)
        behind_images = prompt & (image.flip(-1).cumsum(-1).flip(-1) == 0)
        self._tokens = {"image": image, "query": behind_images, "prompt": prompt, "real": real}
        self._placeholders: list[int] = image.sum(-1).tolist()
        vision = (batch.get("encoder_input") or {}).get("vision")
        self._grids = vision["grid_thw"].tolist() if vision else []
        self._model, self._boundary = model, boundary

    def __getitem__(self, selector: Selector) -> Span:
        """Return where the span of a selector lies at its site; all tensors on the CPU."""
        if selector.in_encoder:
            return self._in_encoder(selector.site)
        tokens = self._of(selector.span)  # [b, s]
        return Span(tokens.nonzero(as_tuple=True), tokens.sum(-1).tolist())

    def _in_encoder(self, site: str) -> Span:
        order = self._model.vision.arrange(self._grids).order  # [m]
        if site == "merger":
            return Span((torch.arange(len(order)),), self._placeholders)
        unit = self._model.vision.spatial_merge_size**2
        patches = order.argsort()[:, None] * unit + torch.arange(unit)  # [m, unit]
        return Span((patches.flatten(),), [count * unit for count in self._placeholders])

    def _of(self, span: str) -> Tensor:
        """Return which tokens a span of the decoder holds, bool [b, s]."""
        tokens = self._tokens
        match span:
            case "image_first":
                return _first(tokens["image"])
            case "image_last":
                return self._published() if self._boundary == "halp" else _last(tokens["image"])
            case "image_mean" | "image_all":
                return tokens["image"]
            case "query_last":
                return _last(tokens["prompt"])
            case "query_mean":
                return tokens["query"]
            case "last":
                return _last(tokens["real"])
        return tokens["real"]

    def _published(self) -> Tensor:
        """Return the tokens that the published HALP scripts take for `image_last`, bool [b, s]."""
        chosen = torch.zeros_like(self._tokens["real"])
        grids, unit = iter(self._grids), self._model.vision.spatial_merge_size**2
        for row, (real, count) in enumerate(
            zip(self._tokens["real"], self._placeholders, strict=True)
        ):
            patches, left = None, count * unit
            while left:
                t, h, w = next(grids)
                patches, left = patches or t * h * w, left - t * h * w
            if patches is not None:
                columns = real.nonzero().flatten()
                chosen[row, columns[min(patches, len(columns) // 2)]] = True
        return chosen


def _first(tokens: Tensor) -> Tensor:
    return tokens & (tokens.cumsum(-1) == 1)


def _last(tokens: Tensor) -> Tensor:
    return _first(tokens.flip(-1)).flip(-1)


def _real(batch: Mapping[str, Any], image: Tensor) -> Tensor:
    """Return which tokens are no padding, bool [b, s].

    Padding has position 0 on all axes, and of the text of a row only its first token has. On the
    left the mask tells padding and that token apart: the last token attends to its whole row.
    """
    positions, mask = batch.get("input_pos"), batch.get("mask")
    if positions is None or positions.ndim != 3:
        raise ValueError(
            "spans need positions on three axes, input_pos [b, s, 3]; make the batch with "
            "inference_batch or padded_collate"
        )
    at_zero = (positions == 0).all(-1).cpu() & ~image
    if isinstance(mask, Tensor) and mask.ndim == 3:
        real = mask[:, -1].cpu()
    else:
        begun = ~at_zero
        begun[:, 0] = True
        real = begun.flip(-1).cumsum(-1).flip(-1) > 0
    if ((at_zero & real).sum(-1) > 1).any() or (~at_zero & ~real).any():
        raise ValueError(
            "each row must hold one sample, but some hold several; collate them with "
            "padded_collate, not packed_collate"
        )
    return real


def _answers(batch: Mapping[str, Any]) -> Tensor:
    """Return which tokens stand behind the prompt: from the first that has a label, bool [b, s]."""
    if (labels := batch.get("labels")) is None:
        return torch.zeros(batch["tokens"].shape, dtype=torch.bool)
    read = labelled_rows(labels).cpu()  # what is read for the first label is the prompt's last
    return (read.cumsum(-1) > 0) & ~_first(read)
