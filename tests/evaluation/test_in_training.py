"""A table that the model in training answers, and what becomes of its checkpoints by that."""

import json
import shutil
from pathlib import Path

import finetune_runs
import own_runs
import pytest
import tables
import tiny_folder
import torch
from finetune_runs import logged, losses
from omegaconf import OmegaConf
from on_ranks import on_ranks
from training_on_ranks import recipe, run

from torchtune_qwen25vl import training
from torchtune_qwen25vl.evaluation import InTraining, _in_training
from torchtune_qwen25vl.training import _stepping


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny_folder.write_pictures(tmp_path_factory.mktemp("rows") / "rows")


@pytest.fixture
def config(model, rows, tmp_path):
    """A YAML of six steps, evaluated after every second one; changes to it."""
    table = tmp_path / "table.jsonl"
    asked = [
        {
            "image": str(rows.parent / f"{k}-0.png"),
            "question": tiny_folder.QUESTION,
            "answer": tiny_folder.ANSWERS[k % 4],
        }
        for k in (0, 1, 3)
    ]
    tables.write_rows(table, asked)

    def make(name="out", **changes):
        cfg = finetune_runs.config(model, tmp_path / name, max_steps=6, pack_to=None)
        cfg.tokenizer = {
            "_component_": "torchtune_qwen25vl.Qwen25VLTransform",
            "path": f"{model}/tokenizer.json",
            "max_pixels": 25088,
        }
        cfg.dataset = {
            "_component_": "torchtune_qwen25vl.data.llava_dataset",
            "source": str(rows),
        }
        cfg.val_dataset, cfg.eval_every_n_steps = None, 2
        cfg.parts.merger = {"train": "full", "lr": 1e-4}
        cfg.parts.decoder = {"train": "lora", "lr": 1e-3}
        cfg.adapters.lora_rank, cfg.adapters.lora_alpha = 8, 16
        cfg.eval_by_generation = {
            "source": str(table),
            "metrics": ["anls", "cider"],
            "anls_threshold": 0,
            "max_new_tokens": 12,
        }
        for key, value in changes.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        return cfg

    return make


def weights(folder):
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def test_the_training_is_bit_equal_with_and_without(config):
    run(config("with"))
    without = config("without", eval_by_generation=None, eval_every_n_steps=None)
    run(without)
    found, expected = losses(config("with").output_dir), losses(without.output_dir)
    assert found == expected
    assert len(found) == 6
    assert weights(config("with").output_dir) == weights(without.output_dir)


@pytest.mark.parametrize("save", ["model", "adapter"])
def test_the_score_is_that_of_the_recipe_evaluate(config, tmp_path, save):
    cfg = config(save=save)
    run(cfg)
    figures = logged(cfg.output_dir)
    assert sorted(k for k, found in figures.items() if "val_anls" in found) == [2, 4, 6]
    values = [figures[k]["val_anls"] for k in (2, 4, 6)]
    assert values[0] != values[2]
    assert min(values) > 0
    keys = {"min_pixels": None, "max_pixels": None, "max_new_tokens": 12, "anls_threshold": 0}
    keys |= {"metrics": ["anls", "cider"], "output_dir": str(tmp_path / "o")}
    assert tables.run(tmp_path / "out" / save, tmp_path / "table.jsonl", **keys) == 0
    scores = tables.scores(tmp_path / "o")["scores"]
    for name in ("anls", "cider"):
        assert scores[name]["mean"] == pytest.approx(figures[6][f"val_{name}"], abs=1e-6)


def test_the_model_and_chance_are_left_as_they_were(config):
    flagship = recipe().FinetuneRecipe(config())
    flagship.setup()
    flagship.model.train()
    state, before = torch.get_rng_state(), flagship.model.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    first = flagship.table(flagship.model, flagship.tokenizer)
    assert first == flagship.table(flagship.model, flagship.tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in flagship.model.modules())
    assert all(torch.equal(w, before[n]) for n, w in flagship.model.state_dict().items())
    assert not flagship.model.caches_are_setup()


@pytest.mark.parametrize("precision", ["bf16_mixed", "bf16_stochastic"])
def test_in_bf16(config, precision, monkeypatch):
    seen = []
    real = _in_training.score_records
    monkeypatch.setattr(
        _in_training, "score_records", lambda s, records: seen.append(records) or real(s, records)
    )
    optimizer = {"_component_": "torchtune_qwen25vl.training.StochasticAdamW"}
    cfg = config(precision=precision, optimizer=optimizer, max_steps=2)
    cfg.lr_scheduler.num_warmup_steps = 1
    run(cfg)
    assert 0 < logged(cfg.output_dir)[2]["val_anls"] <= 1
    assert max(record.tokens for record in seen[0].values()) > 4


@pytest.mark.parametrize(
    "key", ["enable_activation_checkpointing", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_layers_that_are_wrapped_for_training_answer_as_plain_ones(config, monkeypatch, key):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # inductor needs a C++ compiler
    changes = {"max_steps": 2, "adapters.lora_dropout": 0.0}
    plain, wrapped = config("plain", **changes), config("wrapped", **changes, **{key: True})
    for cfg in (plain, wrapped):
        cfg.lr_scheduler.num_warmup_steps = 1
        run(cfg)
    found, expected = (logged(cfg.output_dir)[2]["val_anls"] for cfg in (wrapped, plain))
    assert found == pytest.approx(expected, abs=1e-6)
    assert expected > 0


@pytest.fixture
def scripted(monkeypatch):
    """Let evaluations come to these values, one after another, whatever the model says."""

    def script(values):
        left = iter(values)
        monkeypatch.setattr(InTraining, "__call__", lambda *_: {"anls": next(left)})

    return script


def kept(cfg):
    """Checkpoints that a run leaves, and those that are marked as the best."""
    found = sorted(path.name for path in Path(cfg.output_dir).glob("step_*"))
    marked = [path.parent.name for path in Path(cfg.output_dir).glob("step_*/best.json")]
    return found, marked


BEST = {"keep_best": "anls", "max_steps": 8, "keep_last_n_checkpoints": 1, "eval_every_n_steps": 1}


def test_the_best_checkpoint_stays_and_is_the_result_if_asked(config, scripted):
    values = [0.1, 0.5, 0.3, 0.6, 0.2, 0.6, 0.1, 0.0]
    plain, best = config("plain", **BEST), config("best", **BEST, save_best=True)
    for cfg in (plain, best):
        scripted(values)
        run(cfg)
        assert kept(cfg) == (["step_4", "step_8"], ["step_4"])
    mark = json.loads((Path(best.output_dir) / "step_4" / "best.json").read_text())
    assert mark == {"step": 4, "value": 0.6, "worse": 0} | {"worse": mark["worse"]}
    assert weights(plain.output_dir) != weights(best.output_dir)
    exported = config("plain", **BEST, export="step_4")
    training.run(lambda: recipe().FinetuneRecipe(exported), training.read_settings(exported))
    assert weights(plain.output_dir) == weights(best.output_dir)


def test_a_run_that_gets_worse_stops_and_is_over(config, scripted):
    cfg = config(**BEST, stop_after_n_worse=2)
    scripted([0.1, 0.5, 0.3, 0.6, 0.2, 0.6, 0.7, 0.8])
    run(cfg)
    assert sorted(losses(cfg.output_dir)) == [1, 2, 3, 4, 5, 6]
    assert kept(cfg) == (["step_4", "step_6"], ["step_4"])
    scripted([])
    assert run(cfg).step == 6  # started again it takes no step more


def test_less_loss_is_better(config):
    cfg = config(**BEST | {"keep_best": "loss"}, val_dataset=None, eval_by_generation=None)
    cfg.val_dataset = cfg.dataset
    run(cfg)
    found = {step: one["val_loss"] for step, one in logged(cfg.output_dir).items()}
    assert kept(cfg)[1] == [f"step_{min(found, key=found.get)}"]


def test_goes_on_as_if_it_had_never_stopped(config, scripted, monkeypatch):
    """The best evaluation, and the worse ones since, are known to a run that goes on."""
    values = [0.5, 0.6, 0.1, 0.2, 0.3, 0.9, 0.9, 0.9]
    changes = {**BEST, "stop_after_n_worse": 3, "save_every_n_steps": 4}
    whole, cut = config("whole", **changes), config("cut", **changes)
    scripted(values)
    run(whole)
    assert sorted(losses(whole.output_dir)) == [1, 2, 3, 4, 5]
    real, taken = _stepping.train_step, []

    def stops(*args, **kwargs):
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(1)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_stepping, "train_step", stops)
        scripted(values)
        with pytest.raises(KeyboardInterrupt):
            run(cut)
    assert kept(cut) == (["step_2", "step_4"], ["step_2"])
    scripted(values[4:])
    run(cut)
    assert logged(cut.output_dir).keys() == logged(whole.output_dir).keys()
    assert losses(cut.output_dir) == losses(whole.output_dir)
    assert kept(cut) == kept(whole) == (["step_2", "step_5"], ["step_2"])
    assert weights(cut.output_dir) == weights(whole.output_dir)


OTHERS = {
    "preference": {"loss": {"name": "dpo"}},
    "distill": {"loss": {"name": "forward_kl"}},
    "policy": {
        "loss": {"name": "grpo"},
        "rewards": [{"_component_": "torchtune_qwen25vl.training.length", "most": 1}],
        "group_size": 2,
        "max_new_tokens": 2,
        "keep_best": "reward",
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_recipes_are_scored_and_kept_likewise(config, model, rows, tmp_path, name):
    cfg = config(**{**BEST, "max_steps": 2, "lr_scheduler.num_warmup_steps": 1, **OTHERS[name]})
    frozen = {"train": "frozen"}
    cfg.adapters.lora_dropout = 0.0
    cfg.parts = {"vision": frozen, "merger": frozen, "decoder": {"train": "lora", "lr": 1e-3}}
    if name == "preference":
        pairs = tiny_folder.write_pairs(tmp_path / "pairs")
        component = "torchtune_qwen25vl.data.preference_dataset"
        cfg.dataset = {"_component_": component, "source": str(pairs)}
    elif name == "distill":
        cfg.teacher_dir = str(model)
    else:
        cfg.val_dataset = cfg.dataset
    own_runs.run(name, cfg)
    figures = logged(cfg.output_dir)
    assert [*figures] == [1, 2]
    assert all(one["val_anls"] > 0 for one in figures.values())
    assert len(kept(cfg)[1]) == 1


def test_a_table_without_a_score_is_refused(config, rows, tmp_path):
    missing = {"image": "nothing.png", "question": "What?", "answer": "x"}
    cfg = config()
    tables.write_rows(Path(cfg.eval_by_generation.source), [missing])
    with pytest.raises(ValueError, match=r"no row of .* has a score, the first as .*nothing.png"):
        run(cfg)
    tables.write_rows(Path(cfg.eval_by_generation.source), [{**missing, "answer": ""}])
    with pytest.raises(ValueError, match=r"eval_by_generation: row 0 .*there is no reference"):
        recipe().FinetuneRecipe(cfg)


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
def test_two_ranks_score_what_one_scores(config, precision):
    """On a sharded model; its training goes on as it does without."""
    changes = {"batch_size": 1, "max_steps": 4, "keep_best": "anls", "save_best": True}
    changes |= {"precision": precision, "adapters.lora_dropout": 0.0}
    two = config("two", **changes, device="cpu")

    def body():
        training.run(lambda: recipe().FinetuneRecipe(two), training.read_settings(two))
        return 0

    assert on_ranks(2, body) == [0, 0]
    one = config("one", **changes | {"batch_size": 2})
    run(one)
    found, expected = logged(two.output_dir), logged(one.output_dir)
    tolerance = 1e-5 if precision == "fp32" else 0.2
    for step in (2, 4):
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=tolerance)
        assert expected[step]["val_anls"] > 0
        assert found[step]["val_anls"] == pytest.approx(expected[step]["val_anls"], abs=tolerance)
    assert len(kept(two)[1]) == 1
    shutil.rmtree(two.output_dir)
