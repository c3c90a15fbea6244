"""Each metric against its published definition, or what another implementation says."""

import random

import numpy as np
import pytest

from torchtune_qwen25vl.data import first_box, overlap
from torchtune_qwen25vl.evaluation import METRICS, Case, averaged, score_rows
from torchtune_qwen25vl.evaluation._choices import choice, choice_by_answer, listed
from torchtune_qwen25vl.evaluation._cider import cider
from torchtune_qwen25vl.evaluation._places import box_iou, moved
from torchtune_qwen25vl.evaluation._texts import anls, edits, exact_match, normalised

SAID = [
    "A red ball on the grass.",
    "two dogs run",
    "dog",
    "A man, who doesn't smile, holds a red umbrella in the rain",
    "",
    "two small dogs two small dogs",
]
WANTED = [
    ["a red ball lies on the grass", "A ball."],
    ["Two dogs run."],
    ["A dog!", "one dog"],
    ["a man holds an umbrella in the rain", "the man with the red umbrella"],
    ["nothing at all"],
    ["two small dogs are running after a red ball in the park"],
]
PYCOCOEVALCAP = [  # 1.2, on the same words
    *(2.6953897781777063, 7.5, 2.0740495709438873, 1.9774275092996652, 0.0, 0.9200567984325854),
]


def test_cider_is_that_of_pycocoevalcap():
    assert cider(SAID, WANTED) == pytest.approx(PYCOCOEVALCAP, rel=1e-12)
    exchanged = cider(SAID, WANTED[::-1])
    assert exchanged != pytest.approx(PYCOCOEVALCAP, rel=1e-3)


def test_cider_is_of_a_corpus():
    assert cider(["a red ball"], [["a red ball"]]) == [0.0]
    alone = cider(SAID[:2], WANTED[:2])
    assert alone[1] != pytest.approx(PYCOCOEVALCAP[1]) or alone[0] != pytest.approx(
        PYCOCOEVALCAP[0]
    )
    assert cider(["A red, ball!", "x"], [["a red ball"], ["y"]])[0] == pytest.approx(7.5)


def slow_edits(a, b):
    """The definition, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    replaced = slow_edits(a[1:], b[1:]) + (a[0] != b[0])
    return min(replaced, slow_edits(a[1:], b) + 1, slow_edits(a, b[1:]) + 1)


def test_edits_are_those_of_the_definition():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 5))) for _ in range(2))
        assert edits(a, b) == slow_edits(a, b)
    assert edits("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Hello  World", ["hello world"], 1.0),
        ("abcd", ["abxy"], 0.5),  # exactly at the threshold: 0 in the paper
        ("abc", ["axy"], 0.0),  # a third
        ("hellp", ["hello", "help"], 0.8),  # the best of both
        ("", ["a"], 0.0),
    ],
)
def test_anls(answer, references, score):
    assert anls(answer, references) == pytest.approx(score)


def test_the_threshold_of_anls_is_an_option():
    assert anls("abcd", ["abxy"], threshold=0.51) == 0.0
    assert anls("abc", ["axy"], threshold=0.3) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The  answer is: Yes!", "answer is yes"),
        ("An apple, a day", "apple day"),
        ("3.5", "3.5"),
        ("$1,000.", "1000"),
        ("-2 to 5%", "-2 to 5"),
        ("well-known", "wellknown"),
        ("\uff21\uff22", "ab"),
        ("theatre", "theatre"),
    ],
)
def test_what_exact_match_does_not_count(text, kept):
    assert normalised(text) == kept


def test_exact_match():
    assert exact_match("A red apple.", ["pear", "red apple"]) == 1.0
    assert exact_match("35", ["3.5"]) == 0.0
    assert exact_match("2", ["-2"]) == 0.0


def test_overlap_is_that_of_counted_pixels():
    rng = random.Random(0)
    for _ in range(50):
        boxes = []
        for _ in range(2):
            (x1, x2), (y1, y2) = (sorted(rng.sample(range(30), 2)) for _ in range(2))
            boxes.append((x1, y1, x2, y2))
        masks = np.zeros((2, 30, 30), dtype=bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        counted = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert overlap(*boxes) == pytest.approx(counted)
    assert overlap((5, 5, 1, 1), (1, 1, 5, 5)) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "a"}]\n```',
        "It is at [10, 20, 30, 40].",
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>",
        "(10, 20), (30, 40)",
        "(10,20,30,40)",
        "[10.0, 20.0, 30.0, 40.0] and [1, 2, 3, 4]",
    ],
)
def test_boxes_in_every_form(answer):
    assert first_box(answer) == [10, 20, 30, 40]
    assert box_iou(answer, [(10, 20, 30, 40)]) == 1.0
    assert box_iou(answer, [(30, 20, 50, 40)]) == 0.0


@pytest.mark.parametrize("answer", ["", "no box", "[1, 2]", "[1, 2, 3]", "(1, 2)"])
def test_what_is_no_box(answer):
    assert first_box(answer) is None
    assert box_iou(answer, [(0, 0, 1, 1)]) == 0.0


def test_boxes_are_moved_to_the_image_that_the_model_saw():
    sizes = [((100, 200), (50, 100))]
    assert moved([(20, 40, 60, 80)], sizes) == ([10, 20, 30, 40],)
    assert box_iou("[10, 20, 30, 40]", moved([(20, 40, 60, 80)], sizes)) == 1.0
    assert box_iou("[20, 40, 60, 80]", moved([(20, 40, 60, 80)], sizes)) == 0.0  # the control
    with pytest.raises(ValueError, match="one image, but the row has 2"):
        moved([(0, 0, 1, 1)], sizes * 2)
    with pytest.raises(ValueError, match="outside its image"):
        moved([(0, 0, 300, 80)], sizes)


def test_exactly_half_an_overlap_counts():
    assert overlap((0, 0, 2, 1), (0, 0, 1, 1)) == 0.5
    assert box_iou("[0, 0, 2, 1]", [(0, 0, 1, 1)]) == 1.0
    assert box_iou("[0, 0, 2, 1]", [(0, 0, 1, 1)], threshold=0.51) == 0.0


def test_the_likeliest_letter():
    assert choice([-1.0, -0.5, -3.0], 1) == 1.0
    assert choice([-1.0, -0.5, -3.0], 0) == 0.0


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1),
        (" (B)", 1),
        ("B. a dog", 1),
        ("B: because", 1),
        ("The answer is C.", 2),
        ("The correct option is (A)", 0),
        ("A dog", 1),  # its words, not the letter A
        ("Dog.", 1),
    ],
)
def test_the_letter_of_an_answer(answer, right):
    choices = ["cat", "dog", "A man"]
    scores = [choice_by_answer(answer, choices, k) for k in range(3)]
    assert scores == [float(k == right) for k in range(3)]


def test_an_answer_that_names_no_choice():
    assert choice_by_answer("A cow stands there", ["cat", "dog"], 0) == 0.0
    assert choice_by_answer("", ["cat", "dog"], 0) == 0.0
    assert listed(["cat", "dog"]) == "A. cat\nB. dog"


def test_every_metric_scores_every_row():
    cases = [
        Case("B", ["b"], [(0, 0, 1, 1)], ["a", "b"], 1, [-1.0, -2.0]),
        Case("a", ["b"], [(0, 0, 1, 1)], ["a", "b"], 1, [-2.0, -1.0]),
    ]
    scores = score_rows(METRICS, cases)
    assert scores == {
        "exact_match": [1.0, 0.0],
        "anls": [1.0, 0.0],
        "cider": [0.0, 0.0],
        "box_iou": [0.0, 0.0],
        "choice": [0.0, 1.0],
        "choice_by_answer": [1.0, 0.0],
    }


def test_the_mean_and_its_standard_error():
    values = [0.0, 1.0, 1.0, 0.5]
    score = averaged(values)
    assert score.mean == pytest.approx(np.mean(values))
    assert score.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert score.n == 4
    assert averaged([1.0]).standard_error is None
    assert averaged([]).mean is None
