"""Metric of boxes: whether the box that an answer names is the one in the table.

Qwen2.5-VL names boxes in pixels of the image as resized for it; a table has them in pixels of the
image as it is stored. Sizes are (height, width), as in smart_resize.
"""

from collections.abc import Sequence

from torchtune_qwen25vl.data import first_box, overlap, scale_box

Box = Sequence[float]  # x1, y1, x2, y2
Size = Sequence[int]


def box_iou(answer: str, references: Sequence[Box], *, threshold: float = 0.5) -> float:
    """Return 1 if the first box of an answer overlaps a reference by the threshold, else 0.

    Args:
        answer: what the model said; 0 if there is no box in it
        references: boxes of the table, as `moved` returns them
        threshold: least intersection over union, exactly which counts
    """
    said = first_box(answer)
    if said is None:
        return 0.0
    return float(max(overlap(said, box) for box in references) >= threshold)


def moved(boxes: Sequence[Box], sizes: Sequence[tuple[Size, Size]]) -> tuple[Box, ...]:
    """Move the boxes of a row to the image as the model sees it.

    Args:
        boxes: boxes of the table
        sizes: size of each image of the row, as it is stored and as the model sees it

    Raises:
        ValueError: if the row has not one image, or a box lies outside it.
    """
    if len(sizes) != 1:
        raise ValueError(f"boxes are those of one image, but the row has {len(sizes)}")
    (height, width), (new_height, new_width) = sizes[0]
    return tuple(scale_box(box, (height, width), (new_height, new_width)) for box in boxes)
