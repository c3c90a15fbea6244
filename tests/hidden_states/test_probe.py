"""Probes: what is there is found, what is not is at chance, and images are not on both sides."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from torchtune_qwen25vl.hidden_states import _probe
from torchtune_qwen25vl.hidden_states.__main__ import main
from torchtune_qwen25vl.hidden_states._probe import probe

ROWS, WIDTH = 160, 4


class Made(SimpleNamespace):
    """States made by hand."""

    def __getitem__(self, name):
        return self.arrays[name]

    def __len__(self):
        return len(self.ids)


def made(labels, arrays, images=None, **changes):
    ids = [str(k) for k in range(len(labels))]
    fields = {
        "ids": ids,
        "states": ["done"] * len(ids),
        "images": images or [f"image {k}" for k in ids],
        "rows": [{"label": label} for label in labels],
        "truths": [""] * len(ids),
        "answers": [""] * len(ids),
        "selectors": list(arrays),
        "arrays": arrays,
    }
    return Made(**fields | changes)


@pytest.fixture
def chance():
    return np.random.default_rng(0)


def test_what_is_there_is_found_and_what_is_not_is_at_chance(chance):
    labels = chance.integers(0, 2, ROWS)
    noise = chance.normal(size=(ROWS, WIDTH))
    arrays = {
        "layer.0/last": noise.astype(np.float32),
        "layer.1/last": (noise + 2 * labels[:, None]).astype(np.float32),
    }
    nothing, something = probe(made(labels.tolist(), arrays), "label")
    assert 0.3 < nothing.auroc < 0.7
    assert something.auroc > 0.95
    for one in (nothing, something):
        assert one.control_is_at_chance
        assert 0 < one.control_error < 0.06
        assert one.rows == ROWS


def test_an_image_is_never_on_both_sides(chance):
    """States that tell the image alone, whose label is drawn, tell nothing of other images."""
    images = np.repeat(np.arange(40), 6)
    labels = chance.integers(0, 2, 40)[images]
    arrays = {"layer.0/last": np.eye(40, dtype=np.float32)[images]}
    named = [f"image {k}" for k in images]
    (grouped,) = probe(made(labels.tolist(), arrays, named), "label")
    (leaking,) = probe(made(labels.tolist(), arrays), "label")
    assert grouped.auroc < 0.65
    assert leaking.auroc > 0.9


def test_several_classes(chance):
    labels = chance.integers(0, 3, ROWS)
    states = np.eye(3, dtype=np.float32)[labels] + 0.1 * chance.normal(size=(ROWS, 3))
    names = np.array(["red", "green", "blue"])[labels].tolist()
    (one,) = probe(made(names, {"norm/last": states}), "label")
    assert one.auroc > 0.99


def test_rows_that_have_no_label_no_state_or_no_image_are_left_out(chance):
    labels = [*(["a", "b"] * 50), "", "a"]
    states = chance.normal(size=(102, WIDTH)).astype(np.float32)
    absent = states.copy()
    absent[:10] = np.nan
    ended = ["done"] * 101 + ["failed"]
    arrays = {"layer.0/last": states, "layer.0/image_last": absent}
    every, some = probe(made(labels, arrays, states=ended), "label")
    assert (every.rows, some.rows) == (100, 90)


@pytest.mark.parametrize(
    ("labels", "said"),
    [(["a"] * 9, "two classes or more"), (["a"] * 8 + ["b"], "are there once"), ([""] * 9, "got")],
)
def test_a_label_with_one_class_is_refused(labels, said):
    states = made(labels, {"norm/last": np.zeros((9, 2), np.float32)})
    with pytest.raises(ValueError, match=said):
        probe(states, "label")


def test_an_unknown_label_is_refused():
    states = made(["a", "b"] * 4, {"norm/last": np.zeros((8, 2), np.float32)})
    with pytest.raises(ValueError, match=r"label is a column of \['label'\], or answer_is_wrong"):
        probe(states, "colour")


def test_whether_the_answer_is_wrong():
    truths, answers = ["Yes", "no", "", "yes"], ["yes.", "yes", "no", " Yes "]
    states = made([1, 2, 3, 4], {}, truths=truths, answers=answers)
    assert _probe.read_labels(states, "answer_is_wrong") == ["false", "true", "", "false"]


def test_the_command(run, table, out, capsys):
    head, *rows = table.read_text().splitlines()
    rows = [f"{row},{('odd', 'even')[k % 2]}" for k, row in enumerate(rows)]
    table.write_text("\n".join([f"{head},kind/two", *rows]))
    assert run() == 0
    assert main(["probe", str(out), "label=kind/two"]) == 0
    told = capsys.readouterr().out
    assert "layer.1/query_last" in told
    report = json.loads((out / "probe-kind_two.json").read_text())
    assert report["probes"][0]["selector"] == "vision/mean"
    assert (out / "probe-kind_two.png").stat().st_size > 1000
    assert main(["probe", str(out), "label=nothing"]) == 2
    with pytest.raises(SystemExit):
        main(["probe", str(out), "kind"])
