"""Streams in training: their order, who reads them, and runs that go on where they stopped."""

import json
from functools import partial
from pathlib import Path

import file_server
import numpy as np
import own_runs
import pytest
import recipe_runs
import tiny_folder
from finetune_runs import config, logged, losses
from omegaconf import OmegaConf
from tiny_folder import write_pairs, write_pictures

from torchtune_qwen25vl.data import SampleDataset
from torchtune_qwen25vl.data.__main__ import main
from torchtune_qwen25vl.media import StreamRows, _streams
from torchtune_qwen25vl.training import Share, TrainSampler
from torchtune_qwen25vl.training._mixing import Portion

WINDOW = 5
SHARDS, ROWS = 3, 7
SMALL = {
    "device": "cpu",
    "precision": "fp32",
    "shuffle": False,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "epochs": None,
    "max_steps": 3,
    "pack_to": None,
    "tokenizer.max_seq_len": 256,
    "dataloader.num_workers": 1,
    "enable_activation_checkpointing": False,
    "warmup_ratio": None,
    "save_every_n_steps": None,
    "optimizer._component_": "torch.optim.AdamW",
    "metric_logger.log_dir": "${output_dir}",
    "metric_logger.filename": "log.txt",
}


def walk(num_samples, steps, **options):
    options = {"shuffle": True, "seed": 3, "window": WINDOW} | options
    sampler = TrainSampler(num_samples, Share(4), steps, **options)
    return [key.place for keys in sampler for key in keys]


def test_a_stream_is_shuffled_in_windows_that_follow_each_other():
    seen = walk(12, range(6))
    for one in (seen[:12], seen[12:]):
        windows = one[:5], one[5:10], one[10:]
        assert [sorted(window) for window in windows] == [
            *([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]),
        ]
    assert seen[:12] != seen[12:]
    assert seen[:5] != [place - 5 for place in seen[5:10]]
    assert seen != walk(12, range(6), seed=4)
    assert walk(12, range(3), shuffle=False) == list(range(12))
    assert walk(12, range(2, 6)) == seen[8:], "a run that begins later sees what it would have seen"


def test_the_order_of_a_stream_takes_no_memory_for_its_rows():
    assert walk(10**12, range(10**9, 10**9 + 1))[0] // WINDOW == 4 * 10**9 // WINDOW


def test_streams_of_a_mixture_go_forward_through_its_passes():
    portions = (Portion("a", 6, 3), Portion("stream", 13, 8, WINDOW))
    seen = walk(11, range(11), portions=portions, window=None)
    assert len(seen) == 44
    of_stream = [place - 6 for place in seen if place >= 6]
    assert [sorted(of_stream[k : k + 5]) for k in (0, 5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert sorted(of_stream[10:13]) == [10, 11, 12]
    assert sorted(of_stream[13:18]) == [0, 1, 2, 3, 4], "the next round"
    assert of_stream[13:18] != of_stream[:5]
    places = [k for k, place in enumerate(seen[:11]) if place >= 6]
    assert places != list(range(3, 11)), "parts follow each other"


# Runs ---------------------------------------------------------------------------------------------


def answer(number):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "red " * (1 + number % 9)}]
    return {"conversations": said}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model with a tokenizer, and files of rows."""
    base = tmp_path_factory.mktemp("streams")
    tiny_folder.write_folder(base / "model", tied=True)
    for k in range(SHARDS):
        rows = [answer(ROWS * k + i) for i in range(ROWS)]
        (base / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return base


def section(base, name="*", **options):
    return {
        "_component_": "torchtune_qwen25vl.data.llava_dataset",
        "source": "json",
        "data_files": f"{base}/{name}.jsonl",
        "streaming": True,
        **options,
    }


def cfg(base, output_dir, **changes):
    made = config(base / "model", output_dir, pack_to=None, **changes)
    made.parts.vision = made.parts.merger = {"train": "frozen"}
    made.adapters.lora_dropout = 0.0
    made.tokenizer = {
        "_component_": "torchtune_qwen25vl.Qwen25VLTransform",
        "path": "${model_dir}/tokenizer.json",
    }
    made.dataset = changes.get("dataset", section(base, shuffle_buffer_size=WINDOW))
    made.val_dataset = section(base, "1")
    return made


def mixed(base, **options):
    """Rows that are streamed beside rows that are not: of these 5 of 7, of those 8 of 14."""
    parts = [
        section(base, "[01]", shuffle_buffer_size=WINDOW, count=8),
        {"_component_": section(base)["_component_"], "source": f"{base}/2.jsonl", "weight": 0.7},
    ]
    return {"_component_": "torchtune_qwen25vl.data.mixture", "datasets": parts, **options}


def test_workers_read_nothing_and_change_nothing(base, tmp_path, monkeypatch):
    own_runs.run("finetune", cfg(base, tmp_path / "alone"))
    opened = []
    read = StreamRows._read
    monkeypatch.setattr(StreamRows, "_read", lambda self, k: opened.append(k) or read(self, k))
    made = cfg(base, tmp_path / "workers", dataloader={"num_workers": 2}, val_dataset=None)
    made.val_dataset, made.eval_every_n_steps = None, None
    own_runs.run("finetune", made)
    assert opened == [0, 0, 0], "for its identity, for the plan and for the one pass that began"
    assert losses(tmp_path / "alone") == losses(tmp_path / "workers")


@pytest.mark.parametrize("data", [section, mixed], ids=["stream", "mixture"])
def test_goes_on_after_sigkill_bit_for_bit(base, tmp_path, data):
    chosen = data(base) if data is mixed else data(base, shuffle_buffer_size=WINDOW)
    made = partial(cfg, base, dataset=chosen)
    own_runs.assert_goes_on_after_sigkill("finetune", made, tmp_path, ["loss", "grad_norm"])


def test_two_ranks_equal_one(base, tmp_path):
    made = [
        cfg(base, tmp_path / name, gradient_accumulation_steps=1, **data)
        for name, data in (("stream", {}), ("mixture", {"dataset": mixed(base)}))
    ]
    own_runs.run_on_two("finetune", made)
    for two in made:
        one = two.copy()
        one.output_dir, one.gradient_accumulation_steps = f"{two.output_dir}-one", 2
        own_runs.run("finetune", one)
        assert_near(one.output_dir, two.output_dir)
    with pytest.raises(AssertionError):
        assert_near(made[0].output_dir, made[1].output_dir)


def assert_near(one, other):
    one, other = logged(one), logged(other)
    assert one.keys() == other.keys()
    for step, figures in one.items():
        for name in figures.keys() & {"loss", "grad_norm", "val_loss"}:
            assert other[step][name] == pytest.approx(figures[name], rel=2e-5), (step, name)


def test_a_run_goes_on_in_the_file_where_it_stopped(base, tmp_path, monkeypatch):
    monkeypatch.setattr(_streams, "HASHED", 1)
    with file_server.serving(base) as (address, _):
        files = [f"{address}/{k}.jsonl" for k in range(SHARDS)]
        data = section(base, data_files=files, split="train[:21]", shuffle_buffer_size=2)
        made = cfg(base, tmp_path / "out", dataset=data)
        own_runs.run("finetune", made)
        made.max_steps = 7
        again, anew = (
            own_runs.make("finetune", {**made, **new}) for new in ({}, {"resume": False})
        )
        for recipe, known in ((again, {0: 7, 1: 7}), (anew, {0: 7})):
            recipe.setup()
            assert recipe.walk.streams.learned() == [known]


def test_a_run_of_another_stream_is_not_this_one(base, tmp_path):
    made = cfg(base, tmp_path / "out", max_steps=3)
    own_runs.run("finetune", made)
    (base / "9.jsonl").write_text(json.dumps(answer(3)) + "\n")
    made.max_steps = 5
    with pytest.raises(ValueError, match=r"\(then, now\) \{'samples': \(21, 22\), 'rows'"):
        own_runs.run("finetune", made)
    Path(base / "9.jsonl").unlink()


def test_a_bad_row_of_a_stream_is_named_and_left_out(base, tmp_path, capsys):
    (tmp_path / "0.jsonl").write_text((base / "0.jsonl").read_text() + '{"conversations": []}\n')
    made = cfg(base, tmp_path / "out", dataset=section(tmp_path, "0", shuffle_buffer_size=4))
    made.dataloader, made.max_steps = {"num_workers": 1}, 3
    with pytest.raises(ValueError, match="json, row 7: "):
        own_runs.run("finetune", made)
    OmegaConf.save(made, tmp_path / "my.yaml")
    words = ["check", str(tmp_path / "my.yaml"), "--report", str(tmp_path), "--num-workers=1"]
    assert main(words) == 1
    assert "json: 8 rows, 1 bad" in (printed := capsys.readouterr().out)
    assert "json: 7 rows, 0 bad" in printed
    made.dataset.skip_bad_rows = str(tmp_path / "report.json")
    assert own_runs.run("finetune", made).walk.left_out == (7,)
    (tmp_path / "0.jsonl").write_text((base / "1.jsonl").read_text() + '{"conversations": []}\n')
    with pytest.raises(ValueError, match=r"json is not the stream that .* is about; run"):
        own_runs.run("finetune", made)


OF_RECIPES = {
    "distill": {"teacher_dir": "${model_dir}"},
    "preference": {"precompute_reference": True, "reference_dir": None},
    "policy": {
        "group_size": 2,
        "max_new_tokens": 3,
        "dataset._component_": "torchtune_qwen25vl.data.llava_dataset",
    },
}


@pytest.mark.parametrize("name", OF_RECIPES)
def test_a_stream_trains_as_its_rows_do(base, tmp_path, name):
    rows = (write_pairs if name == "preference" else write_pictures)(tmp_path / "rows")
    held = {"source": str(rows)}
    streamed = {"source": "json", "data_files": str(rows), "streaming": True}
    for kind, data in (("held", held), ("streamed", streamed | {"media_root": str(rows.parent)})):
        made = OmegaConf.load(own_runs.ROOT / "recipes" / "configs" / f"{name}.yaml")
        changes = SMALL | OF_RECIPES[name] | {f"dataset.{key}": v for key, v in data.items()}
        own = {"model_dir": str(base / "model"), "output_dir": str(tmp_path / kind)}
        for key, value in {**changes, **own}.items():
            OmegaConf.update(made, key, value, force_add=True)
        made.lr_scheduler = {"_component_": "training_on_ranks.constant"}
        if name == "policy":
            made.rewards = [{"_component_": "policy_rewards.odd_letters"}]
        own_runs.run(name, made)
    assert losses(tmp_path / "held") == losses(tmp_path / "streamed")


@pytest.mark.parametrize("key", ["dataset", "val_dataset"])
def test_a_buffer_that_does_nothing_is_refused(base, tmp_path, key):
    made = cfg(base, tmp_path / "out", shuffle=False)
    made.dataset = section(base)
    made[key] = section(base, shuffle_buffer_size=WINDOW)
    with pytest.raises(ValueError, match=f"those of {key} are not shuffled here; leave it out"):
        own_runs.make("finetune", made)


def test_a_recipe_of_torchtune_reads_a_stream_in_order(base, tmp_path):
    rows = write_pictures(tmp_path / "rows")
    streamed = ["dataset.streaming=True", f"dataset.data_files={rows}"]
    streamed += [f"dataset.media_root={rows.parent}"]
    name = "qwen2_5_vl/lora_single_device"
    recipe_runs.run_alone(name, base / "model", rows, tmp_path / "held")
    recipe_runs.run_alone(name, base / "model", "json", tmp_path / "streamed", streamed)
    held = recipe_runs.losses(tmp_path / "held")
    assert len(held) == 4
    assert held == recipe_runs.losses(tmp_path / "streamed")
    shuffled = [*streamed, "shuffle=True", "dataset.shuffle_buffer_size=1"]
    with pytest.raises(ValueError, match="a stream is read in order"):
        recipe_runs.run_alone(name, base / "model", "json", tmp_path / "shuffled", shuffled)


def test_numbers_of_good_rows_follow_from_those_of_bad_ones():
    rows = [{}] * 9
    for bad in ((), (0,), (8, 3), (0, 1, 2, 5, 8)):
        data = SampleDataset(rows, None, dict, source="s", bad_rows=bad)
        expected = np.setdiff1d(np.arange(9), bad).tolist()
        assert [data.row_of(k) for k in range(len(data))] == expected
        with pytest.raises(IndexError):
            data.row_of(len(expected))
