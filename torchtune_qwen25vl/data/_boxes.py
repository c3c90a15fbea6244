"""Boxes and points between an image's own pixels and those of its resized copy.

Qwen2.5-VL names places in absolute pixels of the image *as resized for it*, so a box moves with
min_pixels and max_pixels. Coordinates are edges, from 0 to the width or height inclusive, and are
rounded to whole pixels: there and back a coordinate moves by at most one pixel of the coarser grid.

Sizes are (height, width), as in smart_resize; a box is `[x1, y1, x2, y2]` and a point `[x, y]`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_KEY = r"""["'](?:bbox_2d|point_2d)["']"""
_NUMBER = r"-?\d+(?:\.\d+)?"
_VALUE = re.compile(rf"({_KEY}\s*:\s*)\[(\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*)\]")
_OBJECT = re.compile("<(bbox|ref-object)>")
_BOX = re.compile(
    rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*(?:,|\)\s*,?\s*\()\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]"
)

Size = tuple[int, int]


def boxes_to_resized(text: str, size: Size, resized: Size) -> str:
    """Rewrite every `"bbox_2d": [...]` and `"point_2d": [...]` of a text in resized pixels.

    Args:
        text: question or answer, of which all but the numbers stays as it is
        size: size of the image that the numbers were measured on, EXIF orientation applied
        resized: size of the image that the model sees, `smart_resize` of `size`

    Raises:
        ValueError: if a box is no list of 2 or 4 numbers, or lies outside the image.
    """
    if len(re.findall(_KEY, text)) != len(_VALUE.findall(text)):
        raise ValueError(f"a bbox_2d or point_2d is not a flat list of numbers in {text[:200]!r}")
    return _VALUE.sub(lambda found: found[1] + str(scale_box(_numbers(found), size, resized)), text)


def scale_box(box: Sequence[float], size: Size, new_size: Size) -> list[int]:
    """Move a box or a point of a data set from an image of `size` to one of `new_size`.

    Raises:
        ValueError: if it is not 2 or 4 numbers, is turned inside out, or reaches more than one
            pixel over the border (then it was measured on an image of another size).
    """
    height, width = size
    if len(box) not in (2, 4):
        raise ValueError(f"a box is [x1, y1, x2, y2] and a point [x, y], got {list(box)}")
    ends = [width, height] * (len(box) // 2)
    if not all(-1 <= value <= end + 1 for value, end in zip(box, ends, strict=True)):
        raise ValueError(
            f"box {list(box)} reaches outside its image, {width} wide and {height} high; was it "
            "measured on another size?"
        )
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        raise ValueError(f"a box is [left, top, right, bottom], got {list(box)}")
    scaled = []
    for i, value in enumerate(box):
        old, new = size[1 - i % 2], new_size[1 - i % 2]  # x along the width, y along the height
        scaled.append(min(max(round(value * new / old), 0), new))
    return scaled


def move_boxes(texts: Sequence[str], sizes: Sequence[tuple[Size, Size]]) -> list[str]:
    """Move the boxes in the texts of a row with one image to its resized pixels.

    Args:
        texts: all texts of a row
        sizes: sizes of each image of the row, (original, resized)

    Raises:
        ValueError: if there are boxes but not one image, or a box is none of it.
    """
    if len(sizes) == 1:
        return [boxes_to_resized(text, *sizes[0]) for text in texts]
    if any(re.search(_KEY, text) for text in texts):
        raise ValueError(
            f"boxes in a text belong to one image, but the row has {len(sizes)}; use ms-swift's "
            "objects with image_id"
        )
    return list(texts)


def name_objects(
    texts: Sequence[str], objects: Mapping[str, Any], sizes: Sequence[tuple[Size, Size]]
) -> list[str]:
    """Put ms-swift's `objects` where texts have `<bbox>` and `<ref-object>`, each in order.

    Boxes become `[x1, y1, x2, y2]` in resized pixels, as in Qwen's own grounding examples.

    Args:
        texts: all texts of a row
        objects: "bbox" and "ref"; "bbox_type" ("real" pixels by default, or "norm1", shares of 1);
            "image_id", the image of each box, the first by default
        sizes: sizes of each image of the row, (original, resized)

    Raises:
        ValueError: if there are more or fewer objects than places for them, or a box does not lie
            in an image of the row.

    Source: Custom-dataset.md of ms-swift.
    """
    boxes, kind = objects.get("bbox") or [], objects.get("bbox_type") or "real"
    images = objects.get("image_id") or [0] * len(boxes)
    if kind not in ("real", "norm1"):
        raise ValueError(f"bbox_type is 'real' or 'norm1', got {kind!r}")
    if len(images) != len(boxes) or not set(images) <= set(range(len(sizes))):
        raise ValueError(
            f"every bbox belongs to one of the row's {len(sizes)} images, got image_id {images} "
            f"for {len(boxes)} boxes"
        )
    names = {
        "bbox": [_moved(box, kind, *sizes[i]) for box, i in zip(boxes, images, strict=True)],
        "ref-object": list(objects.get("ref") or []),
    }
    for place, given in names.items():
        marked = sum(text.count(f"<{place}>") for text in texts)
        if marked != len(given):
            raise ValueError(f"every object needs its <{place}>, got {marked} for {len(given)}")
    queues = {place: iter(given) for place, given in names.items()}
    return [_OBJECT.sub(lambda found: next(queues[found[1]]), text) for text in texts]


def first_box(text: str) -> list[float] | None:
    """Read the first box that a text names; None where it names none.

    Boxes are `[x1, y1, x2, y2]`, as in `"bbox_2d": [...]` and in place of `<bbox>`, or
    `(x1, y1), (x2, y2)`, what stands between `<|box_start|>` and `<|box_end|>`.
    """
    found = _BOX.search(text)
    return None if found is None else [float(number) for number in found.groups()]


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the intersection of two boxes over their union; 0 for one turned inside out."""
    left, top = max(one[0], other[0]), max(one[1], other[1])
    right, bottom = min(one[2], other[2]), min(one[3], other[3])
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared) if areas > shared else 0.0


def _moved(box: Sequence[float], kind: str, size: Size, resized: Size) -> str:
    if kind == "norm1":
        box = [value * size[1 - i % 2] for i, value in enumerate(box)]
    return str(scale_box(box, size, resized))


def _numbers(found: re.Match[str]) -> list[float]:
    return [float(number) for number in found[2].split(",")]
