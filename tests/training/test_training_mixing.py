"""A mixture in training: which rows a pass has, and a run of it that goes on where it stopped."""

import json
import shutil
from collections import Counter

import own_runs
import pytest
import tiny_folder
from finetune_runs import config, logged, losses
from training_on_ranks import recipe, run

from torchtune_qwen25vl.training import Share, TrainSampler, ValidationSampler
from torchtune_qwen25vl.training._mixing import Portion, places_of_pass

PORTIONS = (Portion("a", 6, 3), Portion("b", 4, 9), Portion("c", 2, 2))


def passes(count, **options):
    options = {"shuffle": True, "seed": 3} | options
    return [places_of_pass(PORTIONS, epoch, **options).tolist() for epoch in range(count)]


def test_a_pass_has_of_each_part_so_many_rows():
    for one in passes(4):
        parts = [sum(place in wanted for place in one) for wanted in parts_of(PORTIONS)]
        assert parts == [3, 9, 2]


def parts_of(portions):
    first = 0
    for portion in portions:
        yield range(first, first + portion.places)
        first += portion.places


def test_no_row_is_seen_again_before_all_were_seen():
    walked = passes(8)
    for k, (part, portion) in enumerate(zip(parts_of(PORTIONS), PORTIONS, strict=True)):
        seen = [place for one in walked for place in one if place in part]
        rounds = [seen[i : i + portion.places] for i in range(0, len(seen), portion.places)]
        assert all(sorted(one) == list(part) for one in rounds if len(one) == portion.places)
        assert len({tuple(one) for one in rounds[:-1]}) > 1, k
    assert passes(1, seed=4) != walked[:1]
    assert passes(2, shuffle=False) == [
        [0, 1, 2, 6, 7, 8, 9, 6, 7, 8, 9, 6, 10, 11],
        [3, 4, 5, 7, 8, 9, 6, 7, 8, 9, 6, 7, 10, 11],
    ]


def test_samplers_take_the_rows_of_a_pass():
    options = {"shuffle": True, "seed": 5, "portions": PORTIONS}
    whole = [k for keys in TrainSampler(14, Share(7), range(4), **options) for k in keys]
    later = [k for keys in TrainSampler(14, Share(7), range(1, 4), **options) for k in keys]
    assert later == whole[7:]
    for epoch in range(2):
        seen = [key.place for key in whole if key.epoch == epoch]
        expected = places_of_pass(PORTIONS, epoch, shuffle=True, seed=5).tolist()
        assert Counter(seen) == Counter(expected)
        assert seen != expected, "parts follow each other"
    validated = [k for keys in ValidationSampler(14, Share(4), PORTIONS) for k in keys]
    counted = [key.place for key in validated if key.counted]
    assert counted == places_of_pass(PORTIONS, 0, shuffle=False, seed=0).tolist()


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A tiny model that has a tokenizer."""
    return tiny_folder.write_folder(tmp_path_factory.mktemp("reading") / "model", tied=True)


def write_rows(path, answers):
    turns = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": text}] for text in answers]
    path.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    return {"_component_": "torchtune_qwen25vl.data.llava_dataset", "source": str(path)}


@pytest.fixture
def mixed(reading, tmp_path):
    """A YAML over 6 rows of which a pass has 3, and 2 of which it has 5: steps of 4 samples."""
    parts = [
        write_rows(tmp_path / "a.jsonl", ["red " * n for n in range(1, 7)]) | {"weight": 0.5},
        write_rows(tmp_path / "b.jsonl", ["blue " * n for n in range(1, 3)]) | {"count": 5},
    ]
    cfg = config(reading, tmp_path / "out", pack_to=None)
    cfg.parts.vision = cfg.parts.merger = {"train": "frozen"}
    cfg.tokenizer = {
        "_component_": "torchtune_qwen25vl.Qwen25VLTransform",
        "path": "${model_dir}/tokenizer.json",
    }
    cfg.dataset = {"_component_": "torchtune_qwen25vl.data.mixture", "datasets": parts}
    cfg.val_dataset = {**cfg.dataset, "datasets": [{**parts[0], "weight": 1}, parts[1]]}
    cfg.max_steps, cfg.epochs = None, 3
    return cfg


def test_a_run_of_a_mixture_goes_on_bit_for_bit(mixed, tmp_path, capsys):
    run(mixed)
    assert "8 rows, 4 in a step: 3.00 passes" in (plan := capsys.readouterr().out)
    assert f"a pass has 3 rows of the 6 of {tmp_path / 'a.jsonl'}" in plan
    assert f"a pass has 5 rows of the 2 of {tmp_path / 'b.jsonl'}" in plan
    whole = losses(tmp_path / "out")
    assert len(whole) == 6
    shutil.rmtree(tmp_path / "out" / "step_6")
    (tmp_path / "out" / "log.txt").unlink()
    again = run(mixed)  # from step 4 on
    assert again.walk.of_pass == 8
    assert losses(tmp_path / "out") == {step: whole[step] for step in (5, 6)}
    mixed.dataset.datasets[1].count = 4
    with pytest.raises(ValueError, match=r"\(then, now\) \{'dataset': \("):
        recipe().FinetuneRecipe(mixed).setup()


def test_two_ranks_of_a_mixture_equal_one(mixed, tmp_path):
    mixed.adapters.lora_dropout = 0.0
    run(mixed)
    two = mixed.copy()
    two.output_dir, two.gradient_accumulation_steps = str(tmp_path / "two"), 1
    own_runs.run_on_two("finetune", [two])
    one, other = logged(tmp_path / "out"), logged(tmp_path / "two")
    assert one.keys() == other.keys()
    for step, figures in one.items():
        for name in figures.keys() & {"loss", "labels", "grad_norm", "val_loss"}:
            assert other[step][name] == pytest.approx(figures[name], rel=2e-5), (step, name)
    mixed.dataset.datasets[1].count, mixed.output_dir = 6, str(tmp_path / "control")
    run(mixed)
    control = losses(tmp_path / "control")
    assert control[2] != pytest.approx(one[2]["loss"], rel=1e-3), "another share is another run"


def test_a_row_of_a_mixture_that_turned_bad_leaves_its_place(mixed, tmp_path):
    mixed.max_steps, mixed.epochs = 2, None
    mixed.lr_scheduler = {"_component_": "training_on_ranks.constant"}
    first = run(mixed)
    bad = [{"row": 1, "digest": first.dataset.parts[0].rows.digest(1)}]
    sources = [(tmp_path / "a.jsonl", 6, bad), (tmp_path / "b.jsonl", 2, [])]
    entries = [{"source": str(s), "rows": rows, "bad": bad} for s, rows, bad in sources]
    (tmp_path / "report.json").write_text(json.dumps({"datasets": entries}))
    mixed.dataset.skip_bad_rows, mixed.max_steps = str(tmp_path / "report.json"), 4
    again = run(mixed)
    assert again.walk.empty == (1,)
    assert again.walk.of_pass == 8, "shares are those of the rows with which the run began"
    assert sorted(losses(tmp_path / "out")) == [1, 2, 3, 4]


def test_parts_are_checked_before_anything_is_loaded(mixed):
    for change, match in (
        ({"source": 3}, r"dataset.datasets\[0\].source is a text"),
        ({"_component_": "nowhere.at"}, r"dataset.datasets\[0\] must name what can be imported"),
    ):
        cfg = mixed.copy()
        cfg.dataset.datasets[0] = {**cfg.dataset.datasets[0], **change}
        with pytest.raises(ValueError, match=match):
            recipe().FinetuneRecipe(cfg)
