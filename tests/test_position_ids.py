"""Integers against a second, slow implementation that says the rule word for word."""

import json
import math
import pathlib
import random

import pytest
import torch

from torchtune_qwen25vl._position_ids import (
    frame_lengths,
    mrope_position_ids,
    patch_positions,
    window_order,
)

IMAGE, VIDEO, TEXT = 151655, 151656, 7
VECTORS = pathlib.Path(__file__).with_name("mrope_vectors.json")


def slow_positions(layout):
    """Positions of a layout, one token at a time: [(t, h, w), ...].

    A layout is a list of ("text", count), ("image", (1, h, w)) and ("video", (t, h, w), seconds).
    """
    positions = []
    for kind, size, *seconds in layout:
        start = 1 + max((max(position) for position in positions), default=-1)
        if kind == "text":
            positions += [(start + k, start + k, start + k) for k in range(size)]
            continue
        t, h, w = size
        for frame in range(t):
            time = math.trunc(frame * 2 * seconds[0]) if kind == "video" else 0
            for y in range(h // 2):
                for x in range(w // 2):
                    positions.append((start + time, start + y, start + x))
    return positions


def slow_tokens(layout):
    tokens = []
    for kind, size, *_ in layout:
        if kind == "text":
            tokens += [TEXT] * size
        else:
            tokens += [IMAGE if kind == "image" else VIDEO] * (math.prod(size) // 4)
    return tokens


def grids(layouts, kind):
    return [part[1] for layout in layouts for part in layout if part[0] == kind]


def seconds(layouts):
    return [part[2] for layout in layouts for part in layout if part[0] == "video"]


def random_layout(rng):
    """Text, images and videos in any order, neighbours without a token between them included."""
    layout = []
    for _ in range(rng.randint(1, 6)):
        kind = rng.choice(["text", "text", "image", "video"])
        side = lambda: 2 * rng.randint(1, 6)  # noqa: E731
        if kind == "text":
            layout.append(("text", rng.randint(1, 9)))
        elif kind == "image":
            layout.append(("image", (1, side(), side())))
        else:  # multiples of 1/64 s are exact in fp32: the slow rule needs no rounding of its own
            layout.append(("video", (rng.randint(1, 8), side(), side()), rng.randint(1, 200) / 64))
    return layout


def ours(layouts, **kwargs):
    tokens = [slow_tokens(layout) for layout in layouts]
    width = max(map(len, tokens))
    left = kwargs.pop("left", False)
    rows, kept = [], []
    for row in tokens:
        padding, ones = [0] * (width - len(row)), [1] * len(row)
        rows.append(padding + row if left else row + padding)
        kept.append(padding + ones if left else ones + padding)
    positions = mrope_position_ids(
        torch.tensor(rows),
        torch.tensor(grids(layouts, "image")) if grids(layouts, "image") else None,
        grids(layouts, "video"),
        seconds(layouts),
        attention_mask=torch.tensor(kept),
        **kwargs,
    )
    return positions, torch.tensor(kept).bool()


def count_differences(count, seed=0, **kwargs):
    rng = random.Random(seed)
    wrong = 0
    for _ in range(count):
        layout = random_layout(rng)
        positions, _ = ours([layout], **kwargs)
        wrong += positions[0].tolist() != [list(p) for p in slow_positions(layout)]
    return wrong


def test_ten_thousand_random_layouts():
    assert count_differences(10_000) == 0


def test_the_random_layouts_see_a_wrong_rule():
    assert count_differences(200, tokens_per_second=3) > 20


def test_published_vectors():
    for vector in json.loads(VECTORS.read_text()):
        positions = mrope_position_ids(
            torch.tensor([vector["tokens"]]),
            vector["image_grid_thw"],
            vector["video_grid_thw"],
            vector["second_per_grid_ts"],
        )
        assert positions[0].T.tolist() == vector["position_ids"]


# rates at which fp32 reaches an integer that fp64 stays below, and where: 25 * 0.16 is 4 in fp32
@pytest.mark.parametrize(
    ("fps", "frame", "time"), [(25, 25, 4), (12.5, 25, 8), (29, 29, 4), (50, 25, 2), (50, 50, 4)]
)
def test_the_time_of_a_frame_is_fp32(fps, frame, time):
    tokens = torch.full((1, 60), VIDEO)
    positions = mrope_position_ids(tokens, None, [(60, 2, 2)], [2 / fps])
    assert positions[0, frame, 0] == time
    assert math.trunc(frame * 2 * float(torch.tensor(2 / fps))) == time - 1  # in fp64


@pytest.mark.parametrize("left", [False, True])
def test_padding_gets_zero_and_moves_nothing(left):
    rng = random.Random(1)
    for _ in range(200):
        layouts = [random_layout(rng) for _ in range(3)]
        positions, kept = ours(layouts, left=left)
        for row, row_kept, layout in zip(positions, kept, layouts, strict=True):
            assert row[row_kept].tolist() == [list(p) for p in slow_positions(layout)]
            assert not row[~row_kept].any()


def test_worked_example_and_adjacent_images():
    tokens = torch.tensor([[TEXT] + [IMAGE] * 6 + [TEXT]])
    t, h, w = mrope_position_ids(tokens, [[1, 4, 6]])[0].T.tolist()
    assert t == [0, 1, 1, 1, 1, 1, 1, 4]
    assert h == [0, 1, 1, 1, 2, 2, 2, 4]
    assert w == [0, 1, 2, 3, 1, 2, 3, 4]
    adjacent = mrope_position_ids(torch.tensor([[IMAGE] * 5]), [[1, 4, 4], [1, 2, 2]])
    assert adjacent[0, :, 0].tolist() == [0, 0, 0, 0, 2]


def test_half_seconds_are_kept_and_truncated():
    tokens = torch.tensor([[VIDEO] * 4 + [TEXT]])
    positions = mrope_position_ids(tokens, None, [[4, 2, 2]], [0.75])
    assert positions[0, :, 0].tolist() == [0, 1, 3, 4, 5]


def test_long_positions_are_not_capped():
    tokens = torch.full((1, 200_000), TEXT)
    assert mrope_position_ids(tokens)[0, -1].tolist() == [199_999] * 3


@pytest.mark.parametrize(
    ("tokens", "images", "videos", "interval", "match"),
    [
        ([IMAGE] * 3, [[1, 4, 4]], None, None, "4 placeholders .* cut inside"),
        ([IMAGE] * 2 + [TEXT, IMAGE, IMAGE], [[1, 4, 4]], None, None, "4 placeholders"),
        ([IMAGE] * 4, None, None, None, "more placeholders"),
        ([IMAGE] * 5, [[1, 4, 4]], None, None, "more placeholders"),
        ([TEXT] * 4, [[1, 4, 4]], None, None, "1 grids .* are left"),
        ([VIDEO] * 4, None, [[1, 4, 4]], None, "one value per video, got 0 for 1"),
        ([VIDEO] * 4, None, [[1, 4, 4]], [1.0, 1.0], "one value per video, got 2 for 1"),
    ],
)
def test_what_does_not_match_is_refused(tokens, images, videos, interval, match):
    with pytest.raises(ValueError, match=match):
        mrope_position_ids(torch.tensor([tokens]), images, videos, interval)


def slow_windows(t, h, w, side):
    """Windows of an h x w raster of units as lists of raster indices, empty ones left out."""
    windows = []
    for frame in range(t):
        for top in range(0, h, side):
            for left in range(0, w, side):
                windows.append(
                    [
                        (frame * h + y) * w + x
                        for y in range(top, min(top + side, h))
                        for x in range(left, min(left + side, w))
                    ]
                )
    return windows


def test_window_order_against_nested_loops():
    rng = random.Random(2)
    for _ in range(300):
        grid_thw = [
            (rng.randint(1, 3), 2 * rng.randint(1, 11), 2 * rng.randint(1, 11))
            for _ in range(rng.randint(1, 3))
        ]
        order, lengths = window_order(
            grid_thw, spatial_merge_size=2, window_size=112, patch_size=14
        )
        expected_order, expected_lengths, start = [], [], 0
        for t, h, w in grid_thw:
            windows = slow_windows(t, h // 2, w // 2, 4)
            expected_order += [start + index for window in windows for index in window]
            expected_lengths += [4 * len(window) for window in windows]
            start += t * h * w // 4
        assert order.tolist() == expected_order
        assert lengths == expected_lengths


def test_window_order_golden():
    order, lengths = window_order(
        [(1, 10, 14)], spatial_merge_size=2, window_size=112, patch_size=14
    )
    assert order[:20].tolist() == [
        *(0, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 17, 21, 22, 23, 24),
        *(4, 5, 6, 11),
    ]
    assert lengths == [64, 48, 16, 12]


def test_window_order_leaves_no_empty_window():
    _, lengths = window_order([(1, 16, 8)], spatial_merge_size=2, window_size=112, patch_size=14)
    assert lengths == [64, 64]


def test_patch_positions_are_in_block_order():
    assert patch_positions([(1, 2, 4)], 2).tolist() == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 2], [0, 3], [1, 2], [1, 3]),
    ]
    rng = random.Random(3)
    for _ in range(50):
        t, h, w = rng.randint(1, 3), 2 * rng.randint(1, 5), 2 * rng.randint(1, 5)
        expected = [
            [y + dy, x + dx]
            for _ in range(t)
            for y in range(0, h, 2)
            for x in range(0, w, 2)
            for dy in (0, 1)
            for dx in (0, 1)
        ]
        assert patch_positions([(t, h, w)], 2).tolist() == expected


def test_frame_lengths():
    assert frame_lengths([(2, 4, 6), (1, 2, 2)]) == [24, 24, 4]
