"""What is kept of a reference: for every place once, shared out over ranks, found again."""

import json

import pytest
import torch

from torchtune_qwen25vl.training import Share, WithReference, keep_log_probs
from torchtune_qwen25vl.training._reference import _steps


def test_every_place_is_computed_once_whatever_the_ranks():
    for world_size, samples, done in ((1, 4, 0), (2, 2, 0), (3, 2, 6), (2, 4, 9)):
        ranks = [list(_steps(done, 11, Share(samples, r, world_size))) for r in range(world_size)]
        assert len({len(steps) for steps in ranks}) == 1  # they take part in every step
        keys = [key for steps in ranks for step in steps for key in step]
        assert sorted(key.place for key in keys if key.counted) == list(range(done, 11))
        assert all(len(step) == samples for steps in ranks for step in steps)


def test_what_is_kept_is_not_computed_again_and_belongs_to_its_identity(tmp_path):
    path, asked = tmp_path / "kept.jsonl", []

    def compute(steps):
        asked.extend(steps)
        for step in steps:
            yield {key.place: [key.place / 3, -key.place] for key in step if key.counted}

    options = {"identity": {"model": "a", "rows": (1, 2)}, "places": 5, "share": Share(2)}
    first = keep_log_probs(path, compute, **options)
    assert len(asked) == 3
    assert first.tolist() == torch.tensor([[k / 3, -k] for k in range(5)]).tolist()
    assert torch.equal(keep_log_probs(path, compute, **options), first)
    assert len(asked) == 3
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])  # a kill within the last line
    assert torch.equal(keep_log_probs(path, compute, **options), first)
    assert len(asked) == 4
    assert path.read_bytes() == whole
    assert [list(json.loads(line)) for line in whole.splitlines()[1:]] == [
        *(["0", "1"], ["2", "3"], ["4"])
    ]
    with pytest.raises(ValueError, match=r"\(then, now\) \{'model': \('a', 'b'\)\}; restore"):
        keep_log_probs(path, compute, **{**options, "identity": {"model": "b", "rows": [1, 2]}})


def test_a_row_that_turned_bad_leaves_its_place_empty():
    kept = torch.arange(10.0).view(5, 2)
    samples = [{"row": row} for row in (0, 2, 3)]
    found = WithReference(samples, kept, empty=(1, 4))
    assert len(found) == 3
    assert [(s["row"], s["reference"].tolist()) for s in map(found.__getitem__, range(3))] == [
        (0, [0, 1]),
        (2, [4, 5]),
        (3, [6, 7]),
    ]
