"""Where everything stands: integers in, integers out.

Shapes: b batch, s sequence, i images and videos, t h w the grid of one of them in patches,
p patches (sum of t*h*w), m merged units (p / merge**2, one per placeholder).

A patch is 14 x 14 pixels of one frame pair. Patches lie in *block order*: the merge x merge patches
that become one placeholder are neighbours in memory. A frame of 4 x 4 patches, merge 2, by index:

     0  1 |  4  5
     2  3 |  6  7
    ------+------
     8  9 | 12 13
    10 11 | 14 15
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

Grid = Sequence[int]  # t, h, w of one image or video, in patches


def patch_positions(grid_thw: Iterable[Grid], spatial_merge_size: int) -> Tensor:
    """Row and column of every patch within its frame, in block order, int64 [p, 2].

    The 2-D rotary embedding of the vision encoder reads these; time is not encoded there.
    """
    return torch.cat([_frames_patch_positions(t, h, w, spatial_merge_size) for t, h, w in grid_thw])


def _frames_patch_positions(t: int, h: int, w: int, merge: int) -> Tensor:
    rows_and_columns = torch.stack(
        torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), dim=-1
    )  # [h, w, 2]
    blocks = rows_and_columns.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
    return blocks.reshape(h * w, 2).repeat(t, 1)  # [t*h*w, 2]


def window_order(
    grid_thw: Iterable[Grid], *, spatial_merge_size: int, window_size: int, patch_size: int
) -> tuple[Tensor, list[int]]:
    """The order in which merged units are visited window by window, and the windows' lengths.

    A window is `window_size` pixels square and lies within one frame; windows at the right and
    bottom edge are smaller. With windows of 2 x 2 units, a frame of 3 x 3 units is visited as
    [0 1 3 4 | 2 5 | 6 7 | 8].

    Returns:
        order: int64 [m], so that `units[order]` stands window after window
        lengths: patches in each window; they add up to p

    Source: arXiv 2502.13923, section 2.1.1.
    """
    side = window_size // spatial_merge_size // patch_size
    orders, lengths, start = [], [], 0
    for t, h, w in grid_thw:
        window = _windows(t, h // spatial_merge_size, w // spatial_merge_size, side)
        orders.append(window.argsort(stable=True) + start)
        lengths += (window.bincount() * spatial_merge_size**2).tolist()
        start += len(window)
    return torch.cat(orders), lengths


def _windows(frames: int, height: int, width: int, side: int) -> Tensor:
    """The window in which each unit of a frames x height x width raster lies, [m]."""
    f = torch.arange(frames).view(-1, 1, 1)
    y = torch.arange(height).view(1, -1, 1) // side
    x = torch.arange(width).view(1, 1, -1) // side
    rows, columns = -(-height // side), -(-width // side)
    return ((f * rows + y) * columns + x).flatten()


def frame_lengths(grid_thw: Iterable[Grid]) -> list[int]:
    """Patches in each frame: what one patch sees in the layers of full attention."""
    return [h * w for t, h, w in grid_thw for _ in range(t)]


def mrope_position_ids(
    tokens: Tensor,
    image_grid_thw: Tensor | Sequence[Grid] | None = None,
    video_grid_thw: Tensor | Sequence[Grid] | None = None,
    second_per_grid_ts: Tensor | Sequence[float] | None = None,
    *,
    attention_mask: Tensor | None = None,
    image_token_id: int = 151655,
    video_token_id: int = 151656,
    spatial_merge_size: int = 2,
    tokens_per_second: int = 2,
) -> Tensor:
    """Positions of every token on the axes t, h, w by Qwen's own rule.

    Text advances all three axes together. An image or video starts where the text stands: its
    units are raised by their row on h, their column on w, and on t by their time,
    trunc(frame * tokens_per_second * second_per_grid), 0 in an image. Text goes on at 1 + the
    largest position on any axis. Two rows, then text, in an image of 2 x 3 units after one token:

        t  0  1 1 1 1 1 1  4
        h  0  1 1 1 2 2 2  4
        w  0  1 2 3 1 2 3  4

    Images and videos are consumed in the order of the batch, rows after rows.

    Args:
        tokens: int64 [b, s], each image or video as t*h*w / merge**2 placeholders
        image_grid_thw: grids of the images in patches, [images, 3]
        video_grid_thw: grids of the videos in patches, [videos, 3]
        second_per_grid_ts: seconds between two frame groups of each video, [videos]
        attention_mask: [b, s], zero or False at padding, on either side; padding gets position 0
        image_token_id: placeholder of images
        video_token_id: placeholder of videos
        spatial_merge_size: patches per placeholder along h and along w
        tokens_per_second: positions per second of video; 2 by every published config

    Returns:
        int64 [b, s, 3], axes t, h, w, without any cap

    Raises:
        ValueError: where placeholders and grids do not match, or a video comes without its seconds.

    Source: the rule the weights were trained with (QwenLM/Qwen2.5-VL, `get_rope_index_25`), which
    vLLM serves too; transformers leaves it for some videos.
    """
    images = [(grid, 0.0) for grid in _as_list(image_grid_thw)]
    videos = _videos(_as_list(video_grid_thw), _as_list(second_per_grid_ts))
    runs = {image_token_id: iter(images), video_token_id: iter(videos)}
    kept = torch.ones_like(tokens) if attention_mask is None else attention_mask
    positions = tokens.new_zeros(*tokens.shape, 3, dtype=torch.int64)  # [b, s, 3]
    for row, row_kept, row_positions in zip(tokens, kept.bool(), positions, strict=True):
        row_positions[row_kept] = _row_positions(
            row[row_kept].tolist(), runs, spatial_merge_size, tokens_per_second
        ).to(tokens.device)
    for token_id, media in runs.items():
        if left := len(list(media)):
            raise ValueError(
                f"every grid needs its placeholders, but {left} grids of token {token_id} are left "
                "when the tokens end; was the prompt cut, or an image not put into it?"
            )
    return positions


def _as_list(values: Tensor | Sequence | None) -> list:
    return torch.as_tensor([] if values is None else values).tolist()


def _videos(grids: list[Grid], seconds: list[float]) -> list[tuple[Grid, float]]:
    if len(grids) != len(seconds):
        raise ValueError(
            f"second_per_grid_ts needs one value per video, got {len(seconds)} for {len(grids)} "
            "videos; it is temporal_patch_size / frames per second, see Qwen25VLVideoTransform"
        )
    return list(zip(grids, seconds, strict=True))


def _row_positions(
    tokens: list[int],
    runs: dict[int, Iterator[tuple[Grid, float]]],
    merge: int,
    tokens_per_second: int,
) -> Tensor:
    """Positions of one row without padding, [s, 3]."""
    pieces, index, start = [torch.zeros(0, 3, dtype=torch.int64)], 0, 0
    while index < len(tokens):
        if (token := tokens[index]) in runs:
            (t, h, w), seconds = _next_medium(runs[token], token)
            piece = _grid_positions(t, h // merge, w // merge, tokens_per_second * seconds)
            if tokens[index : index + len(piece)] != [token] * len(piece):
                raise ValueError(
                    f"a grid of {t} x {h} x {w} patches needs {len(piece)} placeholders (id "
                    f"{token}) in a row, but the run at index {index} is shorter; was the prompt "
                    "cut inside an image?"
                )
        else:
            end = next((j for j in range(index, len(tokens)) if tokens[j] in runs), len(tokens))
            piece = torch.arange(end - index).unsqueeze(1).expand(-1, 3)  # [text, 3]
        pieces.append(piece + start)
        index += len(piece)
        start = int(pieces[-1].max()) + 1
    return torch.cat(pieces)


def _next_medium(media: Iterator[tuple[Grid, float]], token: int) -> tuple[Grid, float]:
    try:
        return next(media)
    except StopIteration:
        raise ValueError(
            f"every run of placeholders needs its grid, but the tokens hold more placeholders "
            f"(id {token}) than grids were given; pass the grids of all images and videos"
        ) from None


def _grid_positions(frames: int, height: int, width: int, per_frame: float) -> Tensor:
    """Offsets of the units of one image or video, [frames*height*width, 3]."""
    # fp32 and the truncation are part of the rule: at 12 fps they decide which integer it is.
    t = (torch.arange(frames) * per_frame).long()
    axes = torch.meshgrid(t, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes, dim=-1).view(-1, 3)
