"""Batches for the model stages: random tokens and patches with every layout that matters."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl import mrope_position_ids

TEXT_IDS = 1000  # the random models' plain tokens are 0..999


@dataclass(frozen=True)
class Inputs:
    """One batch; images and videos in the order in which they stand in the rows."""

    tokens: Tensor  # [b, s]
    attention_mask: Tensor  # [b, s], 0 at padding
    labels: Tensor  # [b, s], not shifted
    positions: Tensor  # [b, s, 3], Qwen's rule
    pixel_values: Tensor  # [p, 1176]
    grid_thw: Tensor  # [i, 3]
    is_video: tuple[bool, ...]  # [i]
    seconds: tuple[float, ...]  # one for each video
    is_placeholder: Tensor  # [b, s]

    @property
    def ours(self) -> dict[str, Any]:
        """Keyword arguments of our model."""
        kwargs: dict[str, Any] = {"tokens": self.tokens, "input_pos": self.positions}
        if len(self.grid_thw):
            vision = {"pixel_values": self.pixel_values, "grid_thw": self.grid_thw}
            kwargs["encoder_input"] = {"vision": vision}
        if not self.attention_mask[:, 0].all():
            kwargs["mask"] = self._left_padded_mask()
        return kwargs

    @property
    def label_count(self) -> int:
        """How many labels a loss reads: the first of each row has nothing that predicts it."""
        return int((self.labels[:, 1:] != CROSS_ENTROPY_IGNORE_IDX).sum())

    def _left_padded_mask(self) -> Tensor:
        s = self.tokens.shape[1]
        ones = torch.ones(s, s, dtype=torch.bool, device=self.tokens.device)
        return ones.tril() & self.attention_mask.bool()[:, None] | ones.tril().triu()

    def to(self, device: str) -> "Inputs":
        """The same batch on this device."""
        tensors: dict[str, Any] = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def padded_left(self) -> "Inputs":
        """The same rows, padded on the left as generation wants them."""
        shifts = (self.attention_mask == 0).sum(1).tolist()

        def roll(rows: Tensor) -> Tensor:
            pairs = zip(rows, shifts, strict=True)
            return torch.stack([row.roll(shift, 0) for row, shift in pairs])

        return replace(
            self,
            tokens=roll(self.tokens),
            attention_mask=roll(self.attention_mask),
            labels=roll(self.labels),
            positions=roll(self.positions),
            is_placeholder=roll(self.is_placeholder),
        )

    def row(self, index: int) -> "Inputs":
        """One row alone, without padding."""
        kept = self.attention_mask[index].bool()
        media = [self._media_before(index), self._media_before(index + 1)]
        patches = self.grid_thw.prod(-1).cumsum(0)
        first, last = (int(patches[k - 1]) if k else 0 for k in media)
        videos = [sum(self.is_video[:k]) for k in media]
        fields = ("tokens", "attention_mask", "labels", "positions", "is_placeholder")
        return replace(
            self,
            **{name: getattr(self, name)[index : index + 1, kept] for name in fields},
            pixel_values=self.pixel_values[first:last],
            grid_thw=self.grid_thw[slice(*media)],
            is_video=self.is_video[slice(*media)],
            seconds=self.seconds[slice(*videos)],
        )

    def _media_before(self, index: int) -> int:
        placeholders = int((self.is_placeholder[:index]).sum())
        units = (self.grid_thw.prod(-1) // 4).cumsum(0)
        return int((units <= placeholders).sum()) if placeholders else 0


# A row is a list of parts: a count of text tokens, an image (1, h, w), a video (t, h, w, seconds)
LAYOUTS: dict[str, list[list[int | tuple]]] = {
    "image": [[5, (1, 10, 14), 9]],
    "two images": [[3, (1, 8, 8), 2, (1, 6, 18), 8]],
    "mixed batch": [[4, (1, 6, 10), 7], [21], [2, (1, 12, 4), 3, (1, 4, 4), 5]],
    "video": [[4, (5, 4, 6, 0.75), 9]],
    "faint image": [[5, (1, 8, 10), 6]],
    "image and video": [[3, (1, 8, 6), 2, (3, 6, 4, 1.5), 6], [2, (4, 4, 4, 0.5), 12]],
}


def make_inputs(
    layout: list[list[int | tuple]],
    ids: Mapping[str, int],
    *,
    contrast: float = 1.0,
    patch_dim: int = 1176,
    seed: int = 0,
) -> Inputs:
    """Make a right-padded batch of this layout, filled with random tokens and patches.

    The last text part of every row is labelled, as an answer is. Patches have this contrast: at
    0.03, a nearly grey image, the eps of the norms matters.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, labels, grids, is_video, seconds = [], [], [], [], []
    for parts in layout:
        row: list[int] = []
        for part in parts:
            if isinstance(part, int):
                row += [rng.randrange(TEXT_IDS) for _ in range(part)]
                continue
            t, h, w, *interval = part
            kind = "video" if interval else "image"
            placeholders = [ids[f"{kind}_token_id"]] * (t * h * w // 4)
            row += [ids["vision_start_token_id"], *placeholders, ids["vision_end_token_id"]]
            grids.append([t, h, w])
            is_video.append(bool(interval))
            seconds += interval
        answer = parts[-1]
        assert isinstance(answer, int)
        ignored = [CROSS_ENTROPY_IGNORE_IDX] * (len(row) - answer)
        rows.append(row)
        labels.append(ignored + row[-answer:])
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    kept = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    pad = CROSS_ENTROPY_IGNORE_IDX
    patches = sum(t * h * w for t, h, w in grids)
    grid_thw = torch.tensor(grids).view(-1, 3)
    video = torch.tensor(is_video, dtype=torch.bool)
    return Inputs(
        tokens=tokens,
        attention_mask=kept,
        labels=torch.tensor([row + [pad] * (width - len(row)) for row in labels]),
        positions=mrope_position_ids(
            tokens,
            grid_thw[~video],
            grid_thw[video],
            seconds,
            attention_mask=kept,
            image_token_id=ids["image_token_id"],
            video_token_id=ids["video_token_id"],
        ),
        pixel_values=contrast * torch.randn(patches, patch_dim, generator=generator),
        grid_thw=grid_thw,
        is_video=tuple(is_video),
        seconds=tuple(seconds),
        is_placeholder=(tokens == ids["image_token_id"]) | (tokens == ids["video_token_id"]),
    )
