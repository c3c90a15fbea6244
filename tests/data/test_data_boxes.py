"""Boxes move with the resize, and come back to where they were."""

import json
import random

import pytest

from torchtune_qwen25vl import smart_resize
from torchtune_qwen25vl.data._boxes import (
    boxes_to_resized,
    move_boxes,
    name_objects,
    scale_box,
)


def box_text(box, key="bbox_2d"):
    return f'```json\n[{{"{key}": {box}, "label": "a [box]"}}]\n```'


def box_of(text, key="bbox_2d"):
    return json.loads(text.removeprefix("```json\n").removesuffix("\n```"))[0][key]


def test_boxes_come_back_within_a_pixel_of_the_coarser_grid():
    """1,000 boxes in pictures of many sizes, under several limits; the corners of each included."""
    rng = random.Random(0)
    for limits in ({}, {"max_pixels": 200704}, {"min_pixels": 401408}):
        for _ in range(300):
            height, width = rng.randint(30, 4000), rng.randint(30, 4000)
            resized = smart_resize(height, width, **limits)
            x1, x2 = sorted(rng.uniform(0, width) for _ in range(2))
            y1, y2 = sorted(rng.uniform(0, height) for _ in range(2))
            for box in ([x1, y1, x2, y2], [0, 0, width, height]):
                there = boxes_to_resized(box_text(box), (height, width), resized)
                back = scale_box(box_of(there), resized, (height, width))
                assert all(isinstance(value, int) for value in box_of(there))
                for i, (value, found) in enumerate(zip(box, back, strict=True)):
                    axis = 1 - i % 2
                    coarser = max(1, (height, width)[axis] / resized[axis])
                    assert abs(value - found) <= coarser
                    assert 0 <= box_of(there)[i] <= resized[axis]


def test_without_the_move_boxes_are_elsewhere():
    """The control: what a box left in original pixels is off by, at the default limits."""
    resized = smart_resize(3000, 4000)
    moved = scale_box([3000, 2000, 3600, 2400], (3000, 4000), resized)
    assert moved == [861, 560, 1033, 672]
    assert min(abs(a - b) for a, b in zip(moved, [3000, 2000, 3600, 2400], strict=True)) > 1000


@pytest.mark.parametrize("key", ["bbox_2d", "point_2d"])
def test_only_the_numbers_of_a_text_change(key):
    box = [10, 20.5] if key == "point_2d" else [10, 20.5, 30, 40]
    doubled = [20, 41] if key == "point_2d" else [20, 41, 60, 80]
    text = box_text(box, key)
    assert boxes_to_resized(text, (100, 100), (200, 200)) == box_text(doubled, key)
    python = text.replace('"', "'")
    assert boxes_to_resized(python, (100, 100), (200, 200)) == box_text(doubled, key).replace(
        '"', "'"
    )
    plain = 'a bbox_2d: [1, 2] and "bbox": [1, 2, 3, 4]'
    assert boxes_to_resized(plain, (100, 100), (200, 200)) == plain


def test_width_and_height_are_not_confused():
    assert scale_box([10, 10, 20, 20], (100, 200), (300, 200)) == [10, 30, 20, 60]


@pytest.mark.parametrize(
    ("box", "match"),
    [
        ([1, 2, 3], r"\[x1, y1, x2, y2\] and a point"),
        ([0, 0, 102, 50], "reaches outside its image, 100 wide and 50 high"),
        ([-2, 0, 10, 10], "reaches outside"),
        ([30, 0, 20, 10], r"\[left, top, right, bottom\]"),
    ],
)
def test_boxes_that_cannot_be_are_refused(box, match):
    with pytest.raises(ValueError, match=match):
        boxes_to_resized(box_text(box), (50, 100), (56, 112))


@pytest.mark.parametrize("value", ["[[1, 2, 3, 4]]", "null", '["a", 2, 3, 4]', "<bbox>"])
def test_boxes_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="not a flat list of numbers"):
        boxes_to_resized(box_text(value), (50, 100), (56, 112))


def test_a_text_with_boxes_has_one_picture():
    sizes = [((50, 100), (100, 200))]
    assert move_boxes(["no box", box_text([1, 2])], sizes) == ["no box", box_text([2, 4])]
    assert move_boxes(["no box"], []) == ["no box"]
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"the row has {count}"):
            move_boxes([box_text([1, 2])], sizes * count)


def test_objects_replace_their_places_in_order():
    texts = ["Find the <ref-object>", '{"bbox_2d": <bbox>, "label": "<ref-object>"} at <bbox>']
    objects = {"ref": ["dog", "cat"], "bbox": [[10, 20, 30, 40], [5, 6]], "image_id": [0, 1]}
    sizes = [((50, 100), (100, 200)), ((50, 100), (50, 300))]
    assert name_objects(texts, objects, sizes) == [
        "Find the dog",
        '{"bbox_2d": [20, 40, 60, 80], "label": "cat"} at [15, 6]',
    ]


def test_objects_may_be_shares_of_one():
    objects = {"bbox": [[0.1, 0.5, 1, 1]], "bbox_type": "norm1"}
    assert name_objects(["<bbox>"], objects, [((50, 100), (56, 112))]) == ["[11, 28, 112, 56]"]
    with pytest.raises(ValueError, match="reaches outside"):
        name_objects(["<bbox>"], {**objects, "bbox": [[0, 0, 1.5, 1]]}, [((50, 100), (56, 112))])


@pytest.mark.parametrize(
    ("objects", "match"),
    [
        ({"bbox": [[1, 2]], "ref": []}, "its <bbox>, got 2 for 1"),
        ({"bbox": [[1, 2], [3, 4]], "ref": ["a"]}, "its <ref-object>, got 0 for 1"),
        ({"bbox": [[1, 2], [3, 4]], "image_id": [0, 1]}, "one of the row's 1 images"),
        ({"bbox": [[1, 2], [3, 4]], "image_id": [0]}, r"image_id \[0\] for 2 boxes"),
        ({"bbox": [[1, 2], [3, 4]], "bbox_type": "norm1000"}, "'real' or 'norm1'"),
    ],
)
def test_objects_that_do_not_fit_are_refused(objects, match):
    with pytest.raises(ValueError, match=match):
        name_objects(["<bbox> <bbox>"], objects, [((50, 100), (56, 112))])
